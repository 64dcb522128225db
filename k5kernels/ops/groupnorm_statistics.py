"""Mean and variance of each group of channels: the first of GroupNorm's two passes over x (§7.1).

    mean     = mean(x)                       over a group's channels and all positions
    variance = mean((x - mean(x))²)

They can be taken chunk by chunk, of frames or of tiles, and merged: merged statistics differ from those of the whole
by rounding alone (relative 3e-7 in float32), whatever the chunks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from k5kernels.memory_format import memory_format_like
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.precision import compute_dtype, upcast


class GroupStatistics(NamedTuple):
    """Of x [B, C, ...] in G groups. size: values in a group. mean, variance: [B, G], float64."""

    size: int
    mean: Tensor
    variance: Tensor

    def merge(self, other: "GroupStatistics") -> "GroupStatistics":
        """The statistics of both chunks together; a chunk without values changes nothing."""
        size = self.size + other.size
        if size == 0:
            return self
        share = other.size / size
        distance = other.mean - self.mean
        mean = self.mean + share * distance
        variance = self.variance + share * (other.variance - self.variance) + share * (1 - share) * distance.square()
        return GroupStatistics(size, mean, variance)


def groupnorm_statistics(x: Tensor, groups: int) -> GroupStatistics:
    """The mean and variance that `groupnorm_silu` normalizes x by; both are 0 where x has no values.

    x: [B, C, ...], any floating dtype. groups: divides C. Computed in float32 or better, merged in float64.

    Raises ValueError where a shape or dtype does not fit. The C++ kernel gives the same bits for any number of threads.
    Saved for the backward: x itself, no copy; with C channels 2 * C bytes a position in bf16, 4 * C in float32.
    """
    check_groups(x, groups)
    size = (x.shape[1] // groups) * math.prod(x.shape[2:])
    return GroupStatistics(size, *torch.ops.k5.groupnorm_statistics(x, groups))


def groupnorm_statistics_reference(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: mean and variance."""
    if x.numel() == 0:
        zeros = x.new_zeros((x.shape[0], groups), dtype=torch.float64)
        return zeros, zeros.clone()
    grouped = upcast(x).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=tuple(range(2, grouped.ndim)), correction=0)
    return mean.double(), variance.double()


def groupnorm_statistics_backward_reference(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor
) -> Tensor:
    """The gradient of x, in its dtype."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format_like(x))
    dtype = compute_dtype(x)
    size = x[0].numel() // mean.shape[1]
    offset, slope = grad_mean / size, 2 * grad_variance / size
    centred = x.to(dtype) - per_channel(mean, x).to(dtype)
    grad_x = per_channel(offset, x).to(dtype) + per_channel(slope, x).to(dtype) * centred
    return grad_x.to(x.dtype).contiguous(memory_format=memory_format_like(x))


def check_channels_second(x: Tensor) -> None:
    """Raise ValueError where x is no floating [B, C, ...]."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating [B, C, ...], got {x.dtype} {list(x.shape)}")


def check_groups(x: Tensor, groups: int) -> None:
    """Raise ValueError where x is no floating [B, C, ...] or `groups` does not divide C."""
    check_channels_second(x)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels of x, got {groups}")


def per_channel(per_group: Tensor, x: Tensor) -> Tensor:
    """[B, G] repeated for the channels of each group, with dimensions that broadcast against x [B, C, ...]."""
    channels = per_group.repeat_interleave(x.shape[1] // per_group.shape[1], dim=1)
    return channels[(...,) + (None,) * (x.ndim - 2)]


def normalize(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """x [B, C, ...] less the mean [B, G] of its group, over the deviation; in float32 or better."""
    dtype = compute_dtype(x)
    inverse_deviation = torch.rsqrt(variance + eps)
    return (x.to(dtype) - per_channel(mean, x).to(dtype)) * per_channel(inverse_deviation, x).to(dtype)


def _fake(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], groups)
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.float64)


def _backward_fake(grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format_like(x))


def _is_narrow(grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor) -> bool:
    return x.dtype in GPU_DTYPES


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx, grad_mean: Tensor, grad_variance: Tensor):
    x, mean = ctx.saved_tensors
    return torch.ops.k5.groupnorm_statistics_backward(grad_mean, grad_variance, x, mean), None


register(
    groupnorm_statistics_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES)},
)
register(
    groupnorm_statistics_backward_reference,
    _backward_fake,
    accepts={
        "cpu": Accepts(
            (torch.float64,),
            others={
                "x in float32 or bfloat16": lambda grad_mean, grad_variance, x, mean: x.dtype in CPU_DTYPES,
            },
        ),
        "cuda": Accepts((torch.float64,), others={"x not in float64": _is_narrow}),
    },
)
