"""The lists of a `BlockMask` in other forms, on the GPU: as bits, from bits, and transposed.

Bits are int32 [B, h, N_b, ceil(N_b / 32)]: bit i of word w of a row is set where the row reads key block 32·w + i. They
take N_b²/8 bytes a head, and a pass over them in order gives ascending lists, of the rows or transposed, without a
sort. A list has no length that the host knows: its memory holds `capacity` entries, and those behind the last offset
are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.block_mask import row_offsets
from k5kernels.triton.launch import launch

# What one program of each kernel looks at in one step: entries of a list, rows, words of rows.
LISTED_KEYS = 128
ROWS_AT_ONCE = 128
LISTED_ROWS, LISTED_WORDS = 8, 8


def lists_to_bits(offsets: Tensor, indices: Tensor) -> Tensor:
    """The lists of a `BlockMask` as bits: int32 [B_m, H_m, N_b, words]."""
    batch, heads, rows = offsets.shape
    blocks = rows - 1
    words = triton.cdiv(blocks, 32)
    bits = indices.new_zeros(batch, heads, blocks, words)
    launch(
        set_bits_kernel, (blocks, batch * heads), offsets.contiguous(), indices, bits, words,
        KEYS=LISTED_KEYS, num_warps=1,
    )  # fmt: skip
    return bits


def bits_to_lists(bits: Tensor, offsets: Tensor, capacity: int) -> Tensor:
    """The key blocks whose bits are set, row after row, each row from its offset on: int32 [capacity].

    offsets: int64 [B, h, N_b + 1], of which the first may be any number that is then the place of the first entry.
    """
    batch, heads, blocks, words = bits.shape
    rows = batch * heads * blocks
    indices = bits.new_empty(capacity)
    launch(
        write_lists_kernel, (triton.cdiv(rows, LISTED_ROWS),),
        bits.contiguous(), offsets.contiguous(), indices, rows, blocks, words,
        ROWS=LISTED_ROWS, WORDS=LISTED_WORDS, num_warps=4,
    )  # fmt: skip
    return indices


def transposed_lists(offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(offsets, indices) of `BlockMask.transpose`: for each key block the query blocks that read it, ascending."""
    return transposed_bits_to_lists(lists_to_bits(offsets, indices), indices.shape[0])


def transposed_bits_to_lists(bits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same of a mask as bits: offsets int64 [B, h, N_b + 1], and readers int32 [capacity]."""
    batch, heads, blocks, words = bits.shape
    bits = bits.contiguous()
    counts = bits.new_empty(batch, heads, blocks, dtype=torch.int64)
    grid = (words, batch * heads)
    launch(count_readers_kernel, grid, bits, counts, blocks, words, ROWS=ROWS_AT_ONCE, num_warps=4)
    offsets = row_offsets(counts)
    readers = bits.new_empty(capacity)
    launch(write_readers_kernel, grid, bits, offsets, readers, blocks, words, ROWS=ROWS_AT_ONCE, num_warps=4)
    return offsets, readers


@triton.jit
def set_bits_kernel(offsets, indices, bits, words, KEYS: tl.constexpr):
    """The list of one row as bits."""
    block = tl.program_id(0)
    mask = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    offsets += mask * (blocks + 1) + block
    bits += (mask * blocks + block) * words
    end = tl.load(offsets + 1)
    for first in range(tl.load(offsets), end, KEYS):
        entry = first + tl.arange(0, KEYS)
        there = entry < end
        column = tl.load(indices + entry, mask=there, other=0)
        tl.atomic_or(bits + column // 32, (1 << (column % 32)).to(tl.int32), mask=there)


@triton.jit
def write_lists_kernel(bits, offsets, indices, total_rows, blocks, words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The numbers of the key blocks whose bits are set in some rows, ascending, each row from its offset on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < total_rows
    source = bits + row.to(tl.int64) * words
    place = tl.load(offsets + row // blocks * (blocks + 1) + row % blocks, mask=there, other=0)
    column = tl.arange(0, WORDS * 32)
    for first in range(0, words, WORDS):
        number = first + column // 32
        word = tl.load(source[:, None] + number[None, :], mask=there[:, None] & (number < words)[None, :], other=0)
        keep = (word >> (column % 32)[None, :]) & 1
        target = place[:, None] + tl.cumsum(keep, axis=1) - 1
        key = tl.broadcast_to((first * 32 + column)[None, :], [ROWS, WORDS * 32])
        tl.store(indices + target, key, mask=keep != 0)
        place += tl.sum(keep, axis=1)


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
