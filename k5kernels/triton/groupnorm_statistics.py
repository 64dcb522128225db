"""Mean and variance of groups on the GPU, in two stages, since there are fewer groups than multiprocessors.

First every run of positions gives the mean of each channel and its squared differences from it; x is read once. Then a
program a group merges these, in float64 and in their order.

Values are summed less a pivot, the mean of the first tile of their run, so that a large mean costs no digits. The first
tile is part of the run, so the pivot cannot be far from all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.triton.launch import launch
from k5kernels.triton.position_tiles import (
    WARPS,
    addresses,
    dense,
    elementwise_tiles,
    empty_result,
    group_tiles,
    load_of_groups,
    run_of_program,
)

MERGED_VALUES = 2048  # means of channels of runs, by one program in one step


def groupnorm_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, float64 [B, G] each, as in `k5kernels.ops.groupnorm_statistics`."""
    mean, variance = (torch.empty(x.shape[0], groups, dtype=torch.float64, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return mean.zero_(), variance.zero_()
    x = dense(x)
    tiles = group_tiles(x, groups)
    parts = mean.new_empty(2, tiles.samples, tiles.runs, tiles.channels)
    launch(moments_kernel, (tiles.programs,), x, parts[0], parts[1], *tiles.arguments, **tiles.constants)
    in_group = tiles.channels * tiles.samples // (x.shape[0] * groups)
    width = triton.next_power_of_2(in_group)
    launch(
        merge_moments_kernel, (x.shape[0] * groups,),
        parts[0], parts[1], mean, variance, tiles.positions, tiles.channels, tiles.length, tiles.runs, in_group,
        RUNS=max(1, MERGED_VALUES // width), WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    return mean, variance


def groupnorm_statistics_backward(grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """The gradient of x, in its dtype."""
    grad_x = empty_result(x)
    if x.numel() == 0:
        return grad_x
    x, groups = dense(x), mean.shape[1]
    tiles = elementwise_tiles(x)
    grads = (grad_mean.contiguous(), grad_variance.contiguous(), mean.contiguous())
    launch(
        moments_backward_kernel, (tiles.programs,),
        x, *grads, grad_x, groups, x.shape[0] * groups / x.numel(), *tiles.arguments, **tiles.constants,
    )  # fmt: skip
    return grad_x


@triton.jit
def moments_kernel(
    x, means, squares, positions, channels, length, runs, step_p, step_c,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a run and some channels: the mean, and the sum of squared differences from it."""
    sample, run, start, end, channel = run_of_program(positions, channels, length, runs, CHANNELS)
    position = start + tl.arange(0, POSITIONS)
    inside = (position < end)[:, None] & (channel < channels)[None, :]
    place = addresses(sample, position, channel, positions, channels, step_p, step_c)
    pivot = tl.sum(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), axis=0)
    pivot /= tl.minimum(end - start, POSITIONS).to(tl.float32)
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    square = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in tl.range(start, end, POSITIONS, num_stages=STAGES):
        position = first + tl.arange(0, POSITIONS)
        inside = (position < end)[:, None] & (channel < channels)[None, :]
        place = addresses(sample, position, channel, positions, channels, step_p, step_c)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, values - pivot[None, :], 0.0)
        total += difference
        square += difference * difference
    offset = tl.sum(total, axis=0).to(tl.float64)
    count = (end - start).to(tl.float64)
    target = (sample * runs + run) * channels + channel
    tl.store(means + target, pivot.to(tl.float64) + offset / count, mask=channel < channels)
    excess = tl.sum(square, axis=0).to(tl.float64) - offset * offset / count
    tl.store(squares + target, tl.maximum(excess, 0.0), mask=channel < channels)


@triton.jit
def merge_moments_kernel(
    means, squares, mean, variance, positions, channels, length, runs, in_group,
    RUNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one group of one sample. in_group: channels of the group."""
    group = tl.program_id(0).to(tl.int64)
    groups = channels // in_group
    column = tl.arange(0, WIDTH)
    base = group // groups * runs * channels + group % groups * in_group
    total = tl.zeros([RUNS, WIDTH], tl.float64)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & (column < in_group)[None, :]
        count = tl.minimum(length, positions - run * length).to(tl.float64)[:, None]
        place = base + run.to(tl.int64)[:, None] * channels + column[None, :]
        total += count * tl.load(means + place, mask=inside, other=0.0)
    size = tl.cast(positions, tl.float64) * in_group
    centre = tl.sum(tl.sum(total, axis=1), axis=0) / size
    total = tl.zeros([RUNS, WIDTH], tl.float64)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & (column < in_group)[None, :]
        count = tl.minimum(length, positions - run * length).to(tl.float64)[:, None]
        place = base + run.to(tl.int64)[:, None] * channels + column[None, :]
        distance = tl.load(means + place, mask=inside, other=0.0) - centre
        total += tl.where(inside, count * distance * distance, 0.0)
        total += tl.load(squares + place, mask=inside, other=0.0)
    tl.store(mean + group, centre)
    tl.store(variance + group, tl.sum(tl.sum(total, axis=1), axis=0) / size)


@triton.jit
def moments_backward_kernel(
    x, grad_mean, grad_variance, mean, grad_x, groups, share, positions, channels, length, runs, step_p, step_c,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of positions. share: of one value in its group."""
    sample, _, start, end, channel = run_of_program(positions, channels, length, runs, CHANNELS)
    offset = load_of_groups(grad_mean, sample, channel, channels, groups) * share
    slope = load_of_groups(grad_variance, sample, channel, channels, groups) * (2 * share)
    centre = load_of_groups(mean, sample, channel, channels, groups)
    for first in tl.range(start, end, POSITIONS, num_stages=STAGES):
        position = first + tl.arange(0, POSITIONS)
        inside = (position < end)[:, None] & (channel < channels)[None, :]
        place = addresses(sample, position, channel, positions, channels, step_p, step_c)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        values = offset + slope * (values - centre)
        tl.store(grad_x + place, values.to(grad_x.dtype.element_ty), mask=inside)
