"""GroupNorm by given statistics, SiLU, and the padding of the causal convolution that follows (§7.1).

    out = pad(groupnorm_silu_apply(x))      copies of the first frame before it, of its edges around every frame

One pass over x instead of two: the activation without its border is never written. For a whole clip:

    statistics = groupnorm_statistics(x, groups)
    convolution(groupnorm_silu_padded(x, statistics, weight, bias, pad=(2, 1, 1)))      a causal 3 x 3 x 3 kernel
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from k5kernels.memory_format import memory_format_like
from k5kernels.ops.groupnorm_silu_apply import (
    EPS,
    check_affine,
    check_statistics,
    groupnorm_silu_apply_reference,
)
from k5kernels.ops.groupnorm_statistics import GroupStatistics, check_channels_second
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register


def groupnorm_silu_padded(
    x: Tensor,
    statistics: GroupStatistics,
    weight: Tensor,
    bias: Tensor,
    pad: tuple[int, int, int],
    eps: float = EPS,
) -> Tensor:
    """Normalize by the given statistics, activate and pad: [B, C, t + T, h + H + h, w + W + w] in the dtype of x.

    It is dense in `torch.channels_last_3d` where x has channels innermost, else contiguous.

    x: [B, C, T, H, W], any floating dtype. statistics, weight, bias, eps: as `groupnorm_silu_apply` takes them.
    pad: (t, h, w): copies of the first frame before it, of the first and last row and of the first and last column of
    every frame. Where frames that came before stand in for the copies, t is 0.

    Raises ValueError where a shape, dtype or pad does not fit. The bits are those of `groupnorm_silu_apply`, copied.
    Saved for the backward: x itself, no copy. The backward adds the gradient of every copy to that of its origin (of a
    few rows, in float32, in an order that follows from the sizes), then is that of `groupnorm_silu_apply`: it holds
    one gradient without the border more than that does.
    """
    check_channels_second(x)
    _check_pad(x, pad)
    check_statistics(x, statistics)
    check_affine(x, weight, bias)
    return torch.ops.k5.groupnorm_silu_padded(x, statistics.mean, statistics.variance, weight, bias, pad, eps)


def groupnorm_silu_padded_reference(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, pad: Sequence[int], eps: float
) -> Tensor:
    """The definition, in plain PyTorch."""
    out = groupnorm_silu_apply_reference(x, mean, variance, weight, bias, eps)
    for dim, (before, after) in enumerate(_both_sides(pad), start=2):
        source = torch.arange(-before, x.shape[dim] + after, device=x.device).clamp(0, x.shape[dim] - 1)
        out = out.index_select(dim, source)
    return out.contiguous(memory_format=memory_format_like(x))


def add_copies(grad: Tensor, pad: Sequence[int]) -> Tensor:
    """The gradient of what was padded, in memory of its own with gaps: that of every copy added to its origin's."""
    grad = grad.clone(memory_format=torch.preserve_format)
    for dim, (before, after) in enumerate(_both_sides(pad), start=2):
        last = grad.shape[dim] - after - 1
        if before:
            grad.select(dim, before).copy_(grad.narrow(dim, 0, before + 1).sum(dim, dtype=_sum_dtype(grad)))
        if after:
            grad.select(dim, last).copy_(grad.narrow(dim, last, after + 1).sum(dim, dtype=_sum_dtype(grad)))
        grad = grad.narrow(dim, before, last - before + 1)
    return grad


def _both_sides(pad: Sequence[int]) -> list[tuple[int, int]]:
    """Copies before and after, in time, height and width."""
    frames, rows, columns = pad
    return [(frames, 0), (rows, rows), (columns, columns)]


def _sum_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def _check_pad(x: Tensor, pad: Sequence[int]) -> None:
    if x.ndim != 5:
        raise ValueError(f"x: expected [B, C, T, H, W], got {list(x.shape)}")
    if len(pad) != 3 or any(copies < 0 for copies in pad):
        raise ValueError(f"pad: expected three numbers of at least 0 (time, height, width), got {tuple(pad)}")
    if any(copies and not size for copies, size in zip(pad, x.shape[2:], strict=True)):
        raise ValueError(f"pad: {tuple(pad)} asks for copies where x {list(x.shape)} has nothing to copy")


def _fake(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, pad: Sequence[int], eps: float
) -> Tensor:
    sizes = [size + before + after for size, (before, after) in zip(x.shape[2:], _both_sides(pad), strict=True)]
    return torch.empty(
        [*x.shape[:2], *sizes], dtype=x.dtype, device=x.device, memory_format=memory_format_like(x)
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.pad, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    x, mean, variance, weight, bias = ctx.saved_tensors
    grad_x, grad_mean, grad_variance, grad_weight, grad_bias = torch.ops.k5.groupnorm_silu_apply_backward(
        add_copies(grad, ctx.pad), x, mean, variance, weight, bias, ctx.eps
    )
    return grad_x, grad_mean, grad_variance, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


register(
    groupnorm_silu_padded_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES)},
)
