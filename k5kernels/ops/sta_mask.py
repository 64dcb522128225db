"""Sliding-Tile Attention: a block reads the blocks of its clip near it in time and space (§5.4).

Block (t, y, x) reads (t', y', x') where |t-t'| <= w_T // 2, |y-y'| <= w_H // 2 and |x-x'| <= w_W // 2, in blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask, row_offsets
from k5kernels.ops.library import Accepts, register
from k5kernels.token_layout import TokenLayout

# Pairs of blocks that the reference compares at a time: this bounds its memory beyond the result.
CHUNK = 1 << 22


def sta_mask(layout: TokenLayout, window: tuple[int, int, int], device: torch.device | str = "cpu") -> BlockMask:
    """The mask of a window (w_T, w_H, w_W), one for all batches and heads (B_m = H_m = 1).

    window: in blocks, each side at least 1; the released models use (11, 3, 3).

    Raises ValueError where the window is not three positive integers. Bit-reproducible.
    """
    sides = check_window("window", window)
    kept = kept_blocks(layout, sides)
    offsets, indices = torch.ops.k5.sta_mask(layout.block_coordinates(device), sides, kept)
    return BlockMask(offsets, indices, layout)


def kept_blocks(layout: TokenLayout, window: list[int]) -> int:
    """How many blocks the mask keeps, from the sizes alone: for each clip, the product over its axes."""
    kept = 0
    for clip in range(len(layout.clips)):
        pairs = [_pairs_within(length, side // 2) for length, side in zip(layout.block_grid(clip), window, strict=True)]
        kept += pairs[0] * pairs[1] * pairs[2]
    return kept


def _pairs_within(length: int, reach: int) -> int:
    """Pairs (i, j) of 0 <= i, j < length with |i - j| <= reach."""
    reach = torch.sym_min(reach, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)


def check_window(name: str, window: Sequence[int]) -> list[int]:
    """The window as a list; ValueError, which names the argument, where it is not three positive integers."""
    sides = list(window)
    if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"{name}: expected three positive integers (time, height, width) in blocks, got {window}")
    return sides


def sta_mask_reference(coordinates: Tensor, window: list[int], kept: int) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: (offsets, indices) of `BlockMask`.

    coordinates: of the layout's blocks, int64 [N_b, 4]. kept: the number of indices, known from the sizes, so that a
    kernel can allocate them without asking the device.
    """
    blocks = coordinates.shape[0]
    reach = [0, *(side // 2 for side in window)]
    counts, indices = [], []
    for rows in coordinates.split(max(1, CHUNK // blocks)):
        near = torch.ones(rows.shape[0], blocks, dtype=torch.bool, device=rows.device)
        for axis in range(4):
            near &= (rows[:, axis, None] - coordinates[:, axis]).abs() <= reach[axis]
        counts.append(near.sum(-1))
        indices.append(near.nonzero()[:, 1].to(torch.int32))
    return row_offsets(torch.cat(counts)[None, None]), torch.cat(indices)


def _fake(coordinates: Tensor, window: list[int], kept: int) -> tuple[Tensor, Tensor]:
    offsets = coordinates.new_empty(1, 1, coordinates.shape[0] + 1, dtype=torch.int64)
    return offsets, coordinates.new_empty(kept, dtype=torch.int32)


register(
    sta_mask_reference,
    _fake,
    accepts={"cpu": Accepts((torch.int64,)), "cuda": Accepts((torch.int64,))},
)
