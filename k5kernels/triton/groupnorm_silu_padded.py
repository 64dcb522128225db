"""GroupNorm by given statistics, SiLU and a border of copies on the GPU: a program writes a run of the result."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.memory_format import memory_format_like
from k5kernels.triton.groupnorm_silu_apply import inverse_deviation, parameters
from k5kernels.triton.launch import launch
from k5kernels.triton.position_tiles import (
    addresses,
    dense,
    elementwise_tiles,
    load_of_channels,
    load_of_groups,
    run_of_program,
)


def groupnorm_silu_padded(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, pad: Sequence[int], eps: float
) -> Tensor:
    """As in `k5kernels.ops.groupnorm_silu_padded`."""
    B, C, T, H, W = x.shape
    before, rows, columns = pad
    sizes = (B, C, before + T, rows + H + rows, columns + W + columns)
    out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format_like(x))
    if out.numel() == 0:
        return out
    x = dense(x)
    tiles = elementwise_tiles(out)
    position_step, channel_step = (C, 1) if tiles.steps[1] == 1 else (1, T * H * W)
    launch(
        apply_padded_kernel, (tiles.programs,),
        x, *parameters(mean, variance, weight, bias), out, mean.shape[1], eps, T, H, W, before, rows, columns,
        position_step, channel_step, *tiles.arguments, **tiles.constants,
    )  # fmt: skip
    return out


@triton.jit
def apply_padded_kernel(
    x, mean, variance, weight, bias, out, groups, eps, frames, height, width, before, rows, columns, x_step_p, x_step_c,
    positions, channels, length, runs, step_p, step_c,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of positions of the result. What stands in the border is computed again: its origin is mostly in the
    second-level cache."""
    sample, _, start, end, channel = run_of_program(positions, channels, length, runs, CHANNELS)
    centre = load_of_groups(mean, sample, channel, channels, groups)
    inverse = inverse_deviation(variance, sample, channel, channels, groups, eps)
    factor = load_of_channels(weight, channel, channels)
    offset = load_of_channels(bias, channel, channels)
    padded_height, padded_width = height + 2 * rows, width + 2 * columns
    for first in tl.range(start, end, POSITIONS, num_stages=STAGES):
        position = first + tl.arange(0, POSITIONS)
        inside = (position < end)[:, None] & (channel < channels)[None, :]
        line = position // padded_width
        frame = tl.maximum(line // padded_height - before, 0)
        row = tl.minimum(tl.maximum(line % padded_height - rows, 0), height - 1)
        column = tl.minimum(tl.maximum(position % padded_width - columns, 0), width - 1)
        origin = (frame * height + row) * width + column
        source = addresses(sample, origin, channel, frames * height * width, channels, x_step_p, x_step_c)
        values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
        values = (values - centre) * inverse * factor + offset
        values = values / (1 + tl.exp(-values))
        place = addresses(sample, position, channel, positions, channels, step_p, step_c)
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)
