"""Which key blocks each query block reads, per batch and head, as compact lists (§5.4).

The lists are compressed sparse rows: four bytes for each kept block and eight for each row, never N_b² of anything. A
mask that is the same for all samples is stored once (B_m = 1), and so is one that is the same for all heads (H_m = 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from k5kernels.token_layout import TokenLayout

if TYPE_CHECKING:  # it imports torch's compiler, which doubles the time of `import k5kernels`
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

# Entries of the lists that `transpose` works on at a time.
CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Row r of (b, h) reads the key blocks indices[offsets[b, h, r] : offsets[b, h, r + 1]], ascending.

    offsets: int64 [B_m, H_m, N_b + 1], positions in indices; B_m is 1 or B, H_m is 1 or h. indices: int32 [kept].
    layout: of the tokens; no row reads a block of another clip.

    Raises ValueError where shapes or dtypes do not fit. A pytree node: it passes through torch.compile.
    """

    offsets: Tensor
    indices: Tensor
    layout: TokenLayout

    @classmethod
    def from_dense(cls, dense: Tensor, layout: TokenLayout) -> BlockMask:
        """From a mask over blocks, dense: bool [B_m, H_m, N_b, N_b], or [N_b, N_b] for all samples and heads.

        Raises ValueError where the shape does not fit the layout or a block reads one of another clip.
        """
        dense = dense[None, None] if dense.ndim == 2 else dense
        if dense.ndim != 4 or dense.shape[2:] != (layout.blocks, layout.blocks) or dense.dtype != torch.bool:
            raise ValueError(
                f"dense: expected a bool [B, h, {layout.blocks}, {layout.blocks}] for this layout, "
                f"got {dense.dtype} {list(dense.shape)}"
            )
        clip = layout.block_coordinates(dense.device)[:, 0]
        if (dense & (clip[:, None] != clip)).any():
            raise ValueError("dense: a block reads a block of another clip; attention stays inside a clip")
        return cls(row_offsets(dense.sum(-1)), dense.nonzero()[:, -1].to(torch.int32), layout)

    @classmethod
    def from_flex(cls, mask: FlexBlockMask, layout: TokenLayout) -> BlockMask:
        """From a mask of `torch.nn.attention.flex_attention`, whose blocks must be those of the layout.

        Raises ValueError where the layout has blocks of fewer than P² tokens, where the mask has another block size or
        another number of tokens, and where it has blocks that are read in part.
        """
        from torch.nn.attention.flex_attention import noop_mask

        block_size = _flex_block_size(layout)
        if (block_size, block_size) != mask.BLOCK_SIZE:
            raise ValueError(f"mask: expected blocks of {block_size}×{block_size} tokens, got {mask.BLOCK_SIZE}")
        if mask.seq_lengths != (layout.tokens, layout.tokens):
            raise ValueError(f"mask: expected one of {layout.tokens} tokens each way, got {mask.seq_lengths}")
        if mask.mask_mod is not noop_mask and bool(mask.kv_num_blocks.any()):
            raise ValueError("mask: some blocks are read in part (through mask_mod); only whole blocks can be listed")
        return cls.from_dense(mask.to_dense().bool(), layout)

    def __post_init__(self) -> None:
        shape = self.offsets.shape
        if len(shape) != 3 or shape[2] != self.layout.blocks + 1 or self.offsets.dtype != torch.int64:
            raise ValueError(
                f"offsets: expected int64 [B, h, {self.layout.blocks + 1}] for this layout, "
                f"got {self.offsets.dtype} {list(shape)}"
            )
        if self.indices.ndim != 1 or self.indices.dtype != torch.int32:
            raise ValueError(f"indices: expected int32 [kept], got {self.indices.dtype} {list(self.indices.shape)}")

    @property
    def density(self) -> float:
        """Kept blocks divided by N_b² for each head; pairs of blocks of different clips are counted in N_b²."""
        batch, heads, rows = self.offsets.shape
        return self.indices.shape[0] / max(1, batch * heads * (rows - 1) ** 2)

    @property
    def densities(self) -> Tensor:
        """The density of each head: [B_m, H_m] float32."""
        kept = self.offsets[..., -1] - self.offsets[..., 0]
        return kept.float() / max(1, (self.offsets.shape[-1] - 1) ** 2)

    def to_dense(self) -> Tensor:
        """The mask over blocks: bool [B_m, H_m, N_b, N_b]."""
        return lists_to_dense(self.offsets, self.indices)

    def to_flex(self) -> FlexBlockMask:
        """The same mask for `torch.nn.attention.flex_attention.flex_attention`.

        Raises ValueError where the layout has blocks of fewer than P² tokens: flex_attention knows one block size.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        block_size = _flex_block_size(self.layout)
        dense = self.to_dense()
        full_counts = dense.sum(-1, dtype=torch.int32)
        full_indices = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        # The empty list of partial blocks has tensors of its own: compiled for the CPU, flex_attention refuses aliases.
        return FlexBlockMask.from_kv_blocks(
            torch.zeros_like(full_counts),
            torch.zeros_like(full_indices),
            full_counts,
            full_indices,
            BLOCK_SIZE=block_size,
        )

    def transpose(self) -> BlockMask:
        """For each key block the query blocks that read it, ascending. Works on CHUNK entries at a time.

        The kernels of the backward build these lists themselves.
        """
        batch, heads, rows = self.offsets.shape
        keys = batch * heads * (rows - 1)
        counts = self.offsets.new_zeros(keys)
        for _, key in self._entries():
            counts += key.bincount(minlength=keys)
        offsets = row_offsets(counts.view(batch, heads, rows - 1))
        readers, place = torch.empty_like(self.indices), offsets[..., :-1].flatten().clone()
        for reader, key in self._entries():
            key, order = key.sort(stable=True)
            here = key.bincount(minlength=keys)
            rank = torch.arange(key.shape[0], device=key.device) - (here.cumsum(0) - here)[key]
            readers[place[key] + rank] = reader[order]
            place += here
        return BlockMask(offsets, readers, self.layout)

    def _entries(self) -> Iterator[tuple[Tensor, Tensor]]:
        """CHUNK entries at a time: query blocks, int32, and key blocks, these numbered over all samples and heads."""
        blocks = self.offsets.shape[2] - 1
        starts = self.offsets[..., :-1].flatten()
        for first in range(0, self.indices.shape[0], CHUNK):
            indices = self.indices[first : first + CHUNK]
            entries = torch.arange(first, first + indices.shape[0], device=indices.device)
            row = torch.searchsorted(starts, entries, right=True) - 1
            reader = row % blocks
            yield reader.to(torch.int32), row - reader + indices

    def image(self, batch: int = 0, head: int = 0) -> np.ndarray:
        """The mask of one head as a picture: bool [N_b, N_b], query blocks downwards, key blocks to the right."""
        offsets = self.offsets[batch, head]
        first, last = int(offsets[0]), int(offsets[-1])
        one = BlockMask((offsets - first)[None, None], self.indices[first:last], self.layout)
        return one.to_dense()[0, 0].cpu().numpy()


def _flatten(mask: BlockMask) -> tuple[list[Tensor], TokenLayout]:
    return [mask.offsets, mask.indices], mask.layout


def _unflatten(tensors: Iterable[Tensor], layout: TokenLayout) -> BlockMask:
    offsets, indices = tensors
    return BlockMask(offsets, indices, layout)


pytree.register_pytree_node(BlockMask, _flatten, _unflatten)


def row_offsets(counts: Tensor) -> Tensor:
    """Offsets of contiguous rows, int64 [B_m, H_m, N_b + 1], from their lengths, counts: [B_m, H_m, N_b]."""
    ends = counts.flatten().cumsum(0, dtype=torch.int64).view(counts.shape)
    return torch.cat([(ends - counts)[..., :1], ends], dim=-1)


def check_lists(offsets: Tensor, indices: Tensor, blocks: int) -> None:
    """Raise RuntimeError where an offset or an index is out of range; the texts are those of the C++ kernels."""
    ends = offsets.flatten()
    if ends.numel() and (ends[0] != 0 or (ends.diff() < 0).any() or ends[-1] != indices.shape[0]):
        raise RuntimeError(f"mask: expected offsets that ascend from 0 to the {indices.shape[0]} indices there are")
    if ((indices < 0) | (indices >= blocks)).any():
        raise RuntimeError(f"mask: expected indices of blocks, 0 to {blocks - 1}")


def lists_to_dense(offsets: Tensor, indices: Tensor) -> Tensor:
    """Lists as in `BlockMask` to bool [B_m, H_m, N_b, N_b]."""
    batch, heads, rows = offsets.shape
    dense = indices.new_zeros(batch * heads * (rows - 1), rows - 1, dtype=torch.bool)
    dense[_rows(offsets, indices), indices.long()] = True
    return dense.view(batch, heads, rows - 1, rows - 1)


def dense_to_bits(dense: Tensor) -> Tensor:
    """Bool [..., N_b] to int32 [..., ceil(N_b / 32)]: bit i of word w is block 32·w + i."""
    padded = torch.nn.functional.pad(dense.to(torch.int32), (0, -dense.shape[-1] % 32))
    words = padded.unflatten(-1, (padded.shape[-1] // 32, 32))
    return (words << torch.arange(32, dtype=torch.int32, device=dense.device)).sum(-1, dtype=torch.int32)


def bits_to_dense(bits: Tensor) -> Tensor:
    """The inverse for square masks: int32 [..., N_b, ceil(N_b / 32)] to bool [..., N_b, N_b]."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (((bits[..., None] >> places) & 1) != 0).flatten(-2)[..., : bits.shape[-2]]


def _rows(offsets: Tensor, indices: Tensor) -> Tensor:
    """The row of each entry of indices, numbered over all samples and heads: int64 [kept]."""
    counts = offsets.diff(dim=-1).flatten()
    return torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts, output_size=indices.shape[0])


def _flex_block_size(layout: TokenLayout) -> int:
    if not layout.full_blocks:
        raise ValueError(
            f"flex_attention needs blocks of one size: every H and W must be a multiple of {layout.block_side}, "
            f"got the clips {layout.clips}"
        )
    return layout.block_side**2
