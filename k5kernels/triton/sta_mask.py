"""Sliding-Tile Attention's lists on the GPU, in two passes: the first counts, the second writes the lists."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.block_mask import row_offsets
from k5kernels.triton.launch import launch

# Blocks that a program compares with its own at a time.
COMPARED_BLOCKS = 1024


def sta_mask(coordinates: Tensor, window: list[int], kept: int) -> tuple[Tensor, Tensor]:
    """(offsets, indices) of `BlockMask`, as in `k5kernels.ops.sta_mask`. Bit-reproducible."""
    blocks = coordinates.shape[0]
    coordinates = coordinates.contiguous()
    reach = [side // 2 for side in window]
    counts = coordinates.new_empty(1, 1, blocks)
    launch(count_near_kernel, (blocks,), coordinates, counts, blocks, *reach, COLUMNS=COMPARED_BLOCKS)
    offsets = row_offsets(counts)
    indices = coordinates.new_empty(kept, dtype=torch.int32)
    launch(write_near_kernel, (blocks,), coordinates, offsets, indices, blocks, *reach, COLUMNS=COMPARED_BLOCKS)
    return offsets, indices


@triton.jit
def near_blocks(coordinates, row, column, blocks, reach_t, reach_y, reach_x):
    """For each block in `column`, 1 where it is within reach of block `row` and in its clip, else 0: int32."""
    own = coordinates + row * 4
    other = coordinates + column * 4
    there = column < blocks
    near = there & (tl.load(other, mask=there, other=-1) == tl.load(own))
    near &= tl.abs(tl.load(other + 1, mask=there, other=0) - tl.load(own + 1)) <= reach_t
    near &= tl.abs(tl.load(other + 2, mask=there, other=0) - tl.load(own + 2)) <= reach_y
    near &= tl.abs(tl.load(other + 3, mask=there, other=0) - tl.load(own + 3)) <= reach_x
    return near.to(tl.int32)


@triton.jit
def count_near_kernel(coordinates, counts, blocks, reach_t, reach_y, reach_x, COLUMNS: tl.constexpr):
    """The number of blocks that one block reads."""
    row = tl.program_id(0)
    total = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total += near_blocks(coordinates, row, column, blocks, reach_t, reach_y, reach_x)
    tl.store(counts + row, tl.sum(total).to(tl.int64))


@triton.jit
def write_near_kernel(coordinates, offsets, indices, blocks, reach_t, reach_y, reach_x, COLUMNS: tl.constexpr):
    """The blocks that one block reads, ascending."""
    row = tl.program_id(0)
    target = tl.load(offsets + row)
    for first in range(0, blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        near = near_blocks(coordinates, row, column, blocks, reach_t, reach_y, reach_x)
        tl.store(indices + target + tl.cumsum(near, axis=0) - 1, column, mask=near != 0)
        target += tl.sum(near)
