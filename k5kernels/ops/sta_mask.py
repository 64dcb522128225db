"""Sliding-Tile Attention: a block reads the blocks of its clip near it in time and space (§5.4).

Block (t, y, x) reads (t', y', x') where |t-t'| <= w_T // 2, |y-y'| <= w_H // 2 and |x-x'| <= w_W // 2, in blocks.
"""

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask, row_offsets
from k5kernels.ops.library import Accepts, register
from k5kernels.token_layout import TokenLayout

# Cells of the block mask looked at in one step: bounds the memory beyond the result.
CHUNK = 1 << 22


def sta_mask(layout: TokenLayout, window: tuple[int, int, int], device: torch.device | str = "cpu") -> BlockMask:
    """The mask of a window (w_T, w_H, w_W), one for all batches and heads (B_m = H_m = 1).

    window: in blocks, each side at least 1; the released models use (11, 3, 3).

    Raises ValueError where the window is not three positive integers. Bit-reproducible.
    """
    offsets, indices = torch.ops.k5.sta_mask(layout.block_coordinates(device), check_window(window))
    return BlockMask(offsets, indices, layout)


def check_window(window: tuple[int, int, int]) -> list[int]:
    """The window as a list, or ValueError."""
    sides = list(window)
    if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"window: expected three positive integers (time, height, width) in blocks, got {window}")
    return sides


def sta_mask_reference(coordinates: Tensor, window: list[int]) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: (offsets, indices) of `BlockMask`."""
    blocks = coordinates.shape[0]
    reach = coordinates.new_tensor([0, *(side // 2 for side in window)])
    counts, indices = [], []
    for rows in coordinates.split(max(1, CHUNK // blocks)):
        near = torch.ones(rows.shape[0], blocks, dtype=torch.bool, device=rows.device)
        for axis in range(4):
            near &= (rows[:, axis, None] - coordinates[:, axis]).abs() <= reach[axis]
        counts.append(near.sum(-1))
        indices.append(near.nonzero()[:, 1].to(torch.int32))
    return row_offsets(torch.cat(counts)[None, None]), torch.cat(indices)


def _fake(coordinates: Tensor, window: list[int]) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    offsets = coordinates.new_empty(1, 1, coordinates.shape[0] + 1, dtype=torch.int64)
    return offsets, coordinates.new_empty(kept, dtype=torch.int32)


register(
    sta_mask_reference,
    _fake,
    accepts={"cpu": Accepts((torch.int64,)), "cuda": Accepts((torch.int64,))},
)
