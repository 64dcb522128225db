"""GroupNorm by given statistics, then SiLU: the second of GroupNorm's two passes over x (§7.1).

    n = (x - mean) / sqrt(variance + eps) * weight + bias        mean and variance of the group the channel belongs to
    out = n * sigmoid(n)

Computed in float32 (float64 for float64) whatever the dtype of x, rounded once at the end. The statistics may be those
of x, of chunks merged (groupnorm_statistics.py), or of another resolution.
"""

import torch
from torch import Tensor

from k5kernels.memory_format import memory_format_like
from k5kernels.ops.groupnorm_statistics import (
    GroupStatistics,
    check_channels_second,
    normalize,
    per_channel,
)
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.precision import GRAD_LIKE_X, compute_dtype

EPS = 1e-6


def groupnorm_silu_apply(
    x: Tensor, statistics: GroupStatistics, weight: Tensor, bias: Tensor, eps: float = EPS
) -> Tensor:
    """Normalize by the given statistics and activate; the result has the shape and dtype of x.

    It is dense in `torch.channels_last` or `torch.channels_last_3d` where x [B, C, (T,) H, W] has channels
    innermost, else contiguous.

    x: [B, C, ...], any floating dtype. statistics: of [B, G] groups, where G divides C; gradients flow to them too.
    weight, bias: [C], any floating dtype. eps: added to the variance; the default is that of the released HunyuanVideo
    VAE.

    Raises ValueError where a shape or dtype does not fit. The C++ kernel gives the same bits for any number of threads,
    and with the statistics of x itself the bits of `groupnorm_silu`.
    Saved for the backward: x itself, no copy; 2 * C bytes a position in bf16, 4 * C in float32.
    """
    check_channels_second(x)
    check_statistics(x, statistics)
    check_affine(x, weight, bias)
    return torch.ops.k5.groupnorm_silu_apply(x, statistics.mean, statistics.variance, weight, bias, eps)


def groupnorm_silu_apply_reference(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The definition, in plain PyTorch."""
    normalized = normalize(x, mean, variance, eps)
    weight, bias = _affine(weight, bias, x)
    out = torch.nn.functional.silu(normalized * weight + bias)
    return out.to(x.dtype).contiguous(memory_format=memory_format_like(x))


def groupnorm_silu_apply_backward_reference(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in x's dtype), mean, variance (float64), weight and bias (in float32 or better)."""
    normalized, inverse_deviation = normalize(x, mean, variance, eps), torch.rsqrt(variance + eps)
    weight, bias = _affine(weight, bias, x)
    grad = grad.to(normalized.dtype).contiguous(memory_format=memory_format_like(x))
    grad_affine = torch.ops.aten.silu_backward(grad, normalized * weight + bias)
    grad_normalized = grad_affine * weight
    inverse = per_channel(inverse_deviation, x).to(normalized.dtype)
    grad_x = (grad_normalized * inverse).to(x.dtype).contiguous(memory_format=memory_format_like(x))
    in_groups, of_group = (mean.shape[1], x.shape[1] // mean.shape[1]), tuple(range(2, x.ndim + 1))

    def sum_groups(values: Tensor) -> Tensor:  # [B, C, ...] to [B, G]
        return values.unflatten(1, in_groups).sum(of_group, dtype=torch.float64)

    grad_mean = -inverse_deviation * sum_groups(grad_normalized)
    grad_variance = -0.5 * inverse_deviation.square() * sum_groups(grad_normalized * normalized)
    of_channel = (0, *range(2, x.ndim))
    return grad_x, grad_mean, grad_variance, (grad_affine * normalized).sum(of_channel), grad_affine.sum(of_channel)


def check_affine(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError where weight or bias is no floating [C] for x [B, C, ...]."""
    channels = x.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (channels,) or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating {[channels]}, got {tensor.dtype} {list(tensor.shape)}")


def check_statistics(x: Tensor, statistics: GroupStatistics) -> None:
    """Raise ValueError where the statistics are not float64 [B, G] with G a divisor of the channels of x."""
    samples, channels = x.shape[:2]
    for name, tensor in (("statistics.mean", statistics.mean), ("statistics.variance", statistics.variance)):
        groups = tensor.shape[1] if tensor.ndim == 2 and tensor.shape[0] == samples else 0
        if groups == 0 or channels % groups or tensor.dtype != torch.float64:
            raise ValueError(
                f"{name}: expected torch.float64 [{samples}, groups], groups a divisor of the {channels} channels of "
                f"x, got {tensor.dtype} {list(tensor.shape)}"
            )
    if statistics.mean.shape != statistics.variance.shape:
        raise ValueError(
            f"statistics.variance: expected {list(statistics.mean.shape)} like statistics.mean, "
            f"got {list(statistics.variance.shape)}"
        )


def _affine(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32 or better, with dimensions that broadcast against x."""
    dtype, shape = compute_dtype(x), (-1,) + (1,) * (x.ndim - 2)
    return weight.to(dtype).view(shape), bias.to(dtype).view(shape)


def _fake(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format_like(x))


def _backward_fake(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=memory_format_like(x)),
        mean.new_empty(mean.shape),
        variance.new_empty(variance.shape),
        x.new_empty(weight.shape, dtype=compute_dtype(x)),
        x.new_empty(bias.shape, dtype=compute_dtype(x)),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    x, mean, variance, weight, bias = ctx.saved_tensors
    grad_x, grad_mean, grad_variance, grad_weight, grad_bias = torch.ops.k5.groupnorm_silu_apply_backward(
        grad, x, mean, variance, weight, bias, ctx.eps
    )
    return grad_x, grad_mean, grad_variance, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


register(
    groupnorm_silu_apply_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES)},
)
register(
    groupnorm_silu_apply_backward_reference,
    _backward_fake,
    accepts={"cpu": Accepts(CPU_DTYPES, others=GRAD_LIKE_X), "cuda": Accepts(GPU_DTYPES)},
)
