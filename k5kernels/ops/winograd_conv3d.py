"""A 3 x 3 x 3 convolution with fewer products: Winograd's F(4 x 4, 3 x 3) in height and width (§7.1).

    out[:, :, t, y, x] = bias + Σ_{i, j, k < 3} weight[:, :, i, j, k] x[:, :, t + i, y + j, x + k]

A tile of 4 x 4 outputs takes 36 products for each pair of channels and frame of the filter, where the sum above takes
144. Where x does not vary in height and width, neither does the output, to the last bit. The filters are transformed
beforehand, which makes them four times as large:

    filters = winograd_filters(weight)
    out = winograd_conv3d(x, filters, bias)
"""

import torch
from torch import Tensor

from k5kernels.ops.library import Accepts, register

CHANNELS_IN, CHANNELS_OUT = 8, 16  # what the kernel's channels are multiples of
PLANES, TAPS = 37, 3
# As in csrc/cpu/winograd_conv3d.cpp; the last point is infinity.
_FINITE_POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)


def winograd_conv3d(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """The convolution without padding and with unit strides: float32 [B, C_out, T, H, W] in `channels_last_3d`.

    x: float32 [B, C_in, T + 2, H + 2, W + 2], copied where it is not in `channels_last_3d`. filters: of
    `winograd_filters(weight)`. bias: [C_out], floating. Not differentiable. The bits do not depend on the threads.

    Relative to float64, by the L2 norm on normal inputs of 32 to 512 channels, its error is 5e-7 to 6e-7; that of
    PyTorch's convolution there is 2e-7 to 3e-6.
    Raises ValueError where a shape or dtype does not fit.
    """
    if bias.ndim != 1 or bias.shape[0] % CHANNELS_OUT or not bias.is_floating_point():
        raise ValueError(
            f"bias: expected floating [C_out], a multiple of {CHANNELS_OUT}, got {bias.dtype} {list(bias.shape)}"
        )
    channels_in = filters.shape[2] // TAPS if filters.ndim == 4 else 0
    fits = channels_in and channels_in % CHANNELS_IN == 0 and filters.dtype == torch.float32
    if not fits or filters.shape != _filters_shape(bias.shape[0], channels_in):
        raise ValueError(
            f"filters: expected those of winograd_filters for bias {list(bias.shape)}, torch.float32 "
            f"[{PLANES}, C_out / {CHANNELS_OUT}, {TAPS} * C_in, {CHANNELS_OUT}], "
            f"got {filters.dtype} {list(filters.shape)}"
        )
    if x.ndim != 5 or x.shape[1] != channels_in or min(x.shape[2:]) < TAPS or x.dtype != torch.float32:
        raise ValueError(
            f"x: expected torch.float32 [B, {channels_in}, T + 2, H + 2, W + 2], got {x.dtype} {list(x.shape)}"
        )
    return torch.ops.k5.winograd_conv3d(x, filters, bias)


def winograd_filters(weight: Tensor) -> Tensor:
    """The transformed filters, float32 [37, C_out / 16, 3 * C_in, 16], of weight [C_out, C_in, 3, 3, 3]: at 36 points,
    and their sum over height and width.

    Raises ValueError where the shape does not fit: C_in is a multiple of 8 and C_out of 16.
    """
    if (
        weight.ndim != 5
        or weight.shape[2:] != (TAPS, TAPS, TAPS)
        or weight.shape[0] % CHANNELS_OUT
        or weight.shape[1] % CHANNELS_IN
    ):
        raise ValueError(
            f"weight: expected [C_out, C_in, 3, 3, 3], C_out a multiple of {CHANNELS_OUT} and C_in of {CHANNELS_IN}, "
            f"got {list(weight.shape)}"
        )
    to_points = _to_points(weight.device)
    channels_out, channels_in = weight.shape[:2]
    filters = weight.new_empty(_filters_shape(channels_out, channels_in), dtype=torch.float32)
    # A panel at a time: all filters in float64 would be eight times the weight.
    for panel, source in zip(filters.unbind(1), weight.split(CHANNELS_OUT), strict=True):
        source = source.double()
        panel[:-1] = torch.einsum("yj,xk,oitjk->yxtio", to_points, to_points, source).reshape(panel[:-1].shape)
        panel[-1] = torch.einsum("oitjk->tio", source).reshape(panel[-1].shape)
    return filters


def winograd_conv3d_reference(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain PyTorch: the weight back from the filters, and its convolution."""
    back = torch.linalg.pinv(_to_points(filters.device))
    points = filters[:-1].double().reshape(6, 6, -1, TAPS, filters.shape[2] // TAPS, CHANNELS_OUT)
    weight = torch.einsum("jy,kx,yxptio->poitjk", back, back, points).flatten(0, 1)
    out = torch.nn.functional.conv3d(x, weight.to(x.dtype), bias.to(x.dtype))
    return out.contiguous(memory_format=torch.channels_last_3d)


def _to_points(device: torch.device) -> Tensor:
    """[6, 3]: a filter of three taps, a polynomial, at the six points, by Lagrange's weights of these."""
    rows = []
    for point in _FINITE_POINTS:
        weight = 1.0
        for other in _FINITE_POINTS:
            weight *= point - other if point != other else 1.0
        rows.append([1 / weight, point / weight, point**2 / weight])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device=device)


def _filters_shape(channels_out: int, channels_in: int) -> torch.Size:
    return torch.Size((PLANES, channels_out // CHANNELS_OUT, TAPS * channels_in, CHANNELS_OUT))


def _fake(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    B, _, T, H, W = x.shape
    sizes = (B, bias.shape[0], T - 2, H - 2, W - 2)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


register(winograd_conv3d_reference, _fake, accepts={"cpu": Accepts((torch.float32,))})
