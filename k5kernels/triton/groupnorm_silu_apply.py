"""GroupNorm by given statistics and SiLU on the GPU, forward and backward: x is read once, the result written once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.triton.launch import launch
from k5kernels.triton.position_tiles import (
    Tiles,
    addresses,
    dense,
    elementwise_tiles,
    empty_result,
    load_of_channels,
    load_of_groups,
    run_of_program,
    summing_tiles,
)
from k5kernels.triton.token_runs import Runs, sum_of_runs


def groupnorm_silu_apply(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As in `k5kernels.ops.groupnorm_silu_apply`."""
    out = empty_result(x)
    if x.numel() == 0:
        return out
    x = dense(x)
    tiles = elementwise_tiles(x)
    launch(
        apply_kernel, (tiles.programs,),
        x, *parameters(mean, variance, weight, bias), out, mean.shape[1], eps, *tiles.arguments, **tiles.constants,
    )  # fmt: skip
    return out


def groupnorm_silu_apply_backward(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, mean, variance (float64), weight and bias (float32)."""
    grad_x = empty_result(x)
    if x.numel() == 0:
        of_weight, of_bias = (x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
        return grad_x, torch.zeros_like(mean), torch.zeros_like(variance), of_weight, of_bias
    given = (dense(grad, x), dense(x), *parameters(mean, variance, weight, bias))
    of_bias, of_weight = channel_sums(given, eps, grad_x)
    inverse = torch.rsqrt(variance + eps)
    of_mean = -inverse * sum_groups(of_bias, weight, mean.shape[1])
    of_variance = -0.5 * inverse.square() * sum_groups(of_weight, weight, mean.shape[1])
    return grad_x, of_mean, of_variance, of_weight.sum(0), of_bias.sum(0)


def parameters(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def channel_sums(given: Sequence[Tensor], eps: float, grad_x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of bias and weight from each sample, float32 [B, C] each.

    given: grad, x, mean, variance, weight and bias, dense. grad_x: where the gradient of x by given statistics is
    written, or None.
    """
    tiles = summing_tiles(given[1])
    parts = given[1].new_empty(2, tiles.samples * tiles.runs, tiles.channels, dtype=torch.float32)
    launch_gradient(tiles, given, (None, None), grad_x, parts, eps)
    of_bias, of_weight = (parts.new_empty(tiles.samples, tiles.channels) for _ in range(2))
    sum_of_runs(parts, Runs(tiles.samples, tiles.positions, 1, tiles.length, tiles.runs, None), of_bias, of_weight)
    return of_bias, of_weight


def launch_gradient(
    tiles: Tiles,
    given: Sequence[Tensor],
    means: Sequence[Tensor | None],
    grad_x: Tensor | None,
    parts: Tensor | None,
    eps: float,
) -> None:
    """The kernel that computes the gradient of x or sums those of the channels' parameters, or both."""
    launch(
        gradient_kernel, (tiles.programs,),
        *given, *means, grad_x, parts, given[2].shape[1], eps, tiles.samples, *tiles.arguments, **tiles.constants,
    )  # fmt: skip


def sum_groups(of_channels: Tensor, weight: Tensor, groups: int) -> Tensor:
    """[B, C], multiplied by the weight, to float64 sums [B, G]."""
    return (of_channels.double() * weight.double()).unflatten(1, (groups, -1)).sum(-1)


@triton.jit
def inverse_deviation(variance, sample, channel, channels, groups, eps):
    """Of the groups that some channels belong to, float32 [1, CHANNELS]. variance: float64 [B, G]."""
    group = channel // (channels // groups)
    of_group = tl.load(variance + sample * groups + group, mask=channel < channels, other=1.0)
    return (1 / tl.sqrt((of_group + eps).to(tl.float32)))[None, :]


@triton.jit
def apply_kernel(
    x, mean, variance, weight, bias, out, groups, eps, positions, channels, length, runs, step_p, step_c,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of positions."""
    sample, _, start, end, channel = run_of_program(positions, channels, length, runs, CHANNELS)
    centre = load_of_groups(mean, sample, channel, channels, groups)
    inverse = inverse_deviation(variance, sample, channel, channels, groups, eps)
    factor = load_of_channels(weight, channel, channels)
    offset = load_of_channels(bias, channel, channels)
    for first in tl.range(start, end, POSITIONS, num_stages=STAGES):
        position = first + tl.arange(0, POSITIONS)
        inside = (position < end)[:, None] & (channel < channels)[None, :]
        place = addresses(sample, position, channel, positions, channels, step_p, step_c)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        values = (values - centre) * inverse * factor + offset
        values = values / (1 + tl.exp(-values))
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    grad, x, mean, variance, weight, bias, mean_grad, mean_projection, grad_x, parts, groups, eps, samples,
    positions, channels, length, runs, step_p, step_c,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of positions. parts: sums over the run of the gradients of bias, then of weight, float32 [2, B·runs, C].

    mean_grad, mean_projection: float64 [B, G], means over the group of the gradient of the normalized x and of its
    product with that x, where the statistics are those of x; None where they are given.
    """
    sample, run, start, end, channel = run_of_program(positions, channels, length, runs, CHANNELS)
    centre = load_of_groups(mean, sample, channel, channels, groups)
    inverse = inverse_deviation(variance, sample, channel, channels, groups, eps)
    factor = load_of_channels(weight, channel, channels)
    offset = load_of_channels(bias, channel, channels)
    if mean_grad is not None:
        constant = load_of_groups(mean_grad, sample, channel, channels, groups)
        slope = load_of_groups(mean_projection, sample, channel, channels, groups)
    if parts is not None:
        bias_total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        weight_total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in tl.range(start, end, POSITIONS, num_stages=STAGES):
        position = first + tl.arange(0, POSITIONS)
        inside = (position < end)[:, None] & (channel < channels)[None, :]
        place = addresses(sample, position, channel, positions, channels, step_p, step_c)
        grads = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normalized = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - centre) * inverse
        affine = normalized * factor + offset
        sigmoid = 1 / (1 + tl.exp(-affine))
        of_affine = grads * sigmoid * (1 + affine * (1 - sigmoid))
        if grad_x is not None:
            values = of_affine * factor
            if mean_grad is not None:
                values = values - constant - normalized * slope
            tl.store(grad_x + place, (values * inverse).to(grad_x.dtype.element_ty), mask=inside)
        if parts is not None:
            bias_total += of_affine
            weight_total += of_affine * normalized
    if parts is not None:
        target = (sample * runs + run) * channels + channel
        tl.store(parts + target, tl.sum(bias_total, axis=0), mask=channel < channels)
        target += tl.cast(samples, tl.int64) * runs * channels
        tl.store(parts + target, tl.sum(weight_total, axis=0), mask=channel < channels)
