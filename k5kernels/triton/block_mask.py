"""The lists of a `BlockMask` in other forms, on the GPU: as bits, and transposed.

The transposed lists are made from the bits, N_b²/8 bytes a head: a pass over the bits in order gives ascending lists
without a sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.block_mask import row_offsets
from k5kernels.triton.launch import launch

# What one program of each kernel looks at in one step: entries of a list, rows.
LISTED_KEYS = 128
ROWS_AT_ONCE = 128


def lists_to_bits(offsets: Tensor, indices: Tensor, words: int, first_keys: Tensor | None = None) -> Tensor:
    """The lists as bits: bit i of row r is set where the row reads key block first_keys[r] + i.

    int32 [B_m·H_m·N_b, words]. offsets, indices: of `BlockMask`. first_keys: int64 [N_b], zeros where None.
    """
    masks, blocks = offsets.shape[0] * offsets.shape[1], offsets.shape[2] - 1
    bits = indices.new_zeros(masks * blocks, words)
    launch(
        set_bits_kernel, (blocks, masks), offsets.contiguous(), indices, first_keys, bits, words,
        KEYS=LISTED_KEYS, num_warps=1,
    )  # fmt: skip
    return bits


def transposed_lists(offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(offsets, indices) of `BlockMask.transpose`: for each key block the query blocks that read it, ascending."""
    batch, heads, rows = offsets.shape
    blocks = rows - 1
    words = triton.cdiv(blocks, 32)
    bits = lists_to_bits(offsets, indices, words)
    counts = offsets.new_empty(batch, heads, blocks)
    grid = (words, batch * heads)
    launch(count_readers_kernel, grid, bits, counts, blocks, words, ROWS=ROWS_AT_ONCE, num_warps=4)
    own = row_offsets(counts)
    readers = torch.empty_like(indices)
    launch(write_readers_kernel, grid, bits, own, readers, blocks, words, ROWS=ROWS_AT_ONCE, num_warps=4)
    return own, readers


@triton.jit
def set_bits_kernel(offsets, indices, first_keys, bits, words, KEYS: tl.constexpr):
    """The list of one row as bits."""
    block = tl.program_id(0)
    mask = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    first_key = 0
    if first_keys is not None:
        first_key = tl.load(first_keys + block)
    offsets += mask * (blocks + 1) + block
    bits += (mask * blocks + block) * words
    end = tl.load(offsets + 1)
    for first in range(tl.load(offsets), end, KEYS):
        entry = first + tl.arange(0, KEYS)
        there = entry < end
        column = tl.load(indices + entry, mask=there, other=0) - first_key
        tl.atomic_or(bits + column // 32, (1 << (column % 32)).to(tl.int32), mask=there)


@triton.jit
def readers_of_word(bits, mask, word, first, blocks, words, ROWS: tl.constexpr):
    """Whether the rows from `first` on read each of the 32 key blocks of a word: int32 [ROWS, 32]."""
    row = first + tl.arange(0, ROWS)
    there = row < blocks
    found = tl.load(bits + (mask * blocks + row) * words + word, mask=there, other=0)
    return (found[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def count_readers_kernel(bits, counts, blocks, words, ROWS: tl.constexpr):
    """How many query blocks read each of the 32 key blocks of a word."""
    word = tl.program_id(0)
    mask = tl.program_id(1).to(tl.int64)
    total = tl.zeros([32], tl.int32)
    for first in range(0, blocks, ROWS):
        total += tl.sum(readers_of_word(bits, mask, word, first, blocks, words, ROWS), axis=0)
    key = word * 32 + tl.arange(0, 32)
    tl.store(counts + mask * blocks + key, total.to(tl.int64), mask=key < blocks)


@triton.jit
def write_readers_kernel(bits, offsets, readers, blocks, words, ROWS: tl.constexpr):
    """The query blocks that read each of the 32 key blocks of a word, ascending."""
    word = tl.program_id(0)
    mask = tl.program_id(1).to(tl.int64)
    key = word * 32 + tl.arange(0, 32)
    place = tl.load(offsets + mask * (blocks + 1) + key, mask=key < blocks, other=0)
    for first in range(0, blocks, ROWS):
        reads = readers_of_word(bits, mask, word, first, blocks, words, ROWS)
        target = place[None, :] + tl.cumsum(reads, axis=0) - 1
        row = first + tl.arange(0, ROWS)
        tl.store(readers + target, tl.broadcast_to(row[:, None], [ROWS, 32]).to(tl.int32), mask=reads != 0)
        place += tl.sum(reads, axis=0)
