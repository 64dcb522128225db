"""GroupNorm, then SiLU: what stands before every convolution of the VAE (§7.1).

    n = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias    over one group's channels and all positions
    out = n * sigmoid(n)

Computed in float32 (float64 for float64) whatever the dtype of x, rounded once at the end.
"""

import math

import torch
from torch import Tensor

from k5kernels.ops.library import CPU_DTYPES, Accepts, register

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Normalize and activate; the result has the shape and dtype of x.

    It is dense in `torch.channels_last` or `torch.channels_last_3d` where x [B, C, (T,) H, W] has channels
    innermost, else contiguous.

    x: [B, C, ...], any floating dtype. weight, bias: [C], any floating dtype. groups: divides C. eps: added to
    the variance.

    Raises ValueError where a shape or dtype does not fit. Bits depend on no thread count in the C++ kernel; PyTorch's
    GroupNorm, which the reference and the backward call, promises that for one thread count only.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating [B, C, ...], got {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels of x, got {groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (channels,) or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating {[channels]}, got {tensor.dtype} {list(tensor.shape)}")
    return torch.ops.k5.groupnorm_silu(x, weight, bias, groups, eps)


def groupnorm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """The definition, in plain PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normalized = torch.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)
    return torch.nn.functional.silu(normalized).to(x.dtype).contiguous(memory_format=_memory_format(x))


def groupnorm_silu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in x's dtype), weight and bias (in float32 or better).

    Statistics are computed again: reading x once more costs less than the normalized tensor that is needed anyway.
    """
    wide, target = torch.promote_types(x.dtype, torch.float32), _memory_format(x)
    # PyTorch's GroupNorm kernels take channels-last tensors on the CPU only.
    native = target if x.is_cpu else torch.contiguous_format
    x_wide, grad_wide = (t.to(wide).contiguous(memory_format=native) for t in (x, grad))
    weight, bias = weight.to(wide), bias.to(wide)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=target), torch.zeros_like(weight), torch.zeros_like(bias)
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    normalized, mean, inverse_deviation = torch.ops.aten.native_group_norm(x_wide, weight, bias, *sizes, eps)
    grad_normalized = torch.ops.aten.silu_backward(grad_wide, normalized).contiguous(memory_format=native)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_normalized, x_wide, mean, inverse_deviation, weight, *sizes, [True, True, True]
    )
    return grad_x.to(x.dtype).contiguous(memory_format=target), grad_weight, grad_bias


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_innermost = not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1
    return _CHANNELS_LAST.get(x.ndim, torch.contiguous_format) if channels_innermost else torch.contiguous_format


def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x))


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        _fake(x, weight, bias, groups, eps),
        x.new_empty(weight.shape, dtype=wide),
        x.new_empty(bias.shape, dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad: Tensor):
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.k5.groupnorm_silu_backward(grad, x, weight, bias, ctx.groups, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


register(
    groupnorm_silu_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES)},
)
register(
    groupnorm_silu_backward_reference,
    _backward_fake,
)
