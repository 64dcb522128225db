"""What two neighbouring query blocks read, in one list: the order in which a kernel of pairs takes key blocks."""

import triton
import triton.language as tl
from torch import Tensor

from k5kernels.triton.launch import launch

# An entry is a key block and two bits that say whether the first and the second query block of the pair read it.
READERS_BIT = 29
FIRST_READS, SECOND_READS = 1 << READERS_BIT, 2 << READERS_BIT
READERS = tl.constexpr(READERS_BIT)
# Of one program: pairs, and words of their rows at a time.
LISTED_PAIRS, LISTED_WORDS = 4, 4


def bits_to_pairs(bits: Tensor, offsets: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(entries int32 [capacity], counts int32 [B, h, ceil(N_b / 2), 3]) of query blocks 2i and 2i + 1.

    bits: int32 [B, h, N_b, words]. offsets: where the list of each row would begin, int64 [B, h, N_b + 1]; the entries
    of a pair begin where the list of its first row would, for a union is no longer than both lists together. First
    come the key blocks of both, then one of the first's own, one of the second's and so on, then the rest of the longer
    one; each ascending. counts: of both, of the first's own, of the second's own.
    """
    batch, heads, blocks, words = bits.shape
    pairs = triton.cdiv(blocks, 2)
    entries = bits.new_empty(capacity)
    counts = bits.new_empty(batch, heads, pairs, 3)
    launch(
        write_pairs_kernel, (triton.cdiv(batch * heads * pairs, LISTED_PAIRS),),
        bits.contiguous(), offsets.contiguous(), entries, counts, batch * heads * pairs, pairs, blocks, words,
        PAIRS=LISTED_PAIRS, WORDS=LISTED_WORDS, num_warps=4,
    )  # fmt: skip
    return entries, counts


@triton.jit
def bits_of_rows(bits, row, there, first, words, WORDS: tl.constexpr):
    """WORDS words of some rows, a column a bit: int32 [rows, 32 · WORDS]; zeros where a row or word is not there."""
    column = tl.arange(0, WORDS * 32)
    number = first + column // 32
    address = bits + row[:, None] * words + number[None, :]
    found = tl.load(address, mask=there[:, None] & (number < words)[None, :], other=0)
    return (found >> (column % 32)[None, :]) & 1


@triton.jit
def write_pairs_kernel(
    bits, offsets, entries, counts, total, pairs, blocks, words, PAIRS: tl.constexpr, WORDS: tl.constexpr
):
    """The entries of PAIRS pairs: one pass over their two rows counts, a second one writes."""
    number = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    there = number < total
    head = number // pairs
    block = number % pairs * 2
    first_row = head * blocks + block
    has_second = there & (block + 1 < blocks)
    n_both = tl.zeros([PAIRS], tl.int32)
    n_first = tl.zeros([PAIRS], tl.int32)
    n_second = tl.zeros([PAIRS], tl.int32)
    for word in range(0, words, WORDS):
        a = bits_of_rows(bits, first_row, there, word, words, WORDS)
        b = bits_of_rows(bits, first_row + 1, has_second, word, words, WORDS)
        n_both += tl.sum(a & b, axis=1)
        n_first += tl.sum(a & (1 - b), axis=1)
        n_second += tl.sum(b & (1 - a), axis=1)
    tl.store(counts + number * 3, n_both, mask=there)
    tl.store(counts + number * 3 + 1, n_first, mask=there)
    tl.store(counts + number * 3 + 2, n_second, mask=there)
    target = entries + tl.load(offsets + head * (blocks + 1) + block, mask=there, other=0)
    seen_both = tl.zeros([PAIRS], tl.int32)
    seen_first = tl.zeros([PAIRS], tl.int32)
    seen_second = tl.zeros([PAIRS], tl.int32)
    column = tl.arange(0, WORDS * 32)
    for word in range(0, words, WORDS):
        a = bits_of_rows(bits, first_row, there, word, words, WORDS)
        b = bits_of_rows(bits, first_row + 1, has_second, word, words, WORDS)
        both, first, second = a & b, a & (1 - b), b & (1 - a)
        rank_both = seen_both[:, None] + tl.cumsum(both, axis=1) - 1
        rank_first = seen_first[:, None] + tl.cumsum(first, axis=1) - 1
        rank_second = seen_second[:, None] + tl.cumsum(second, axis=1) - 1
        # Of the private ones the first stand in turn with the other's, the rest behind them.
        place_first = n_both[:, None] + rank_first + tl.minimum(rank_first, n_second[:, None])
        place_second = n_both[:, None] + rank_second + tl.minimum(rank_second + 1, n_first[:, None])
        place = tl.where(both != 0, rank_both, tl.where(first != 0, place_first, place_second))
        readers = a + 2 * b
        entry = (word * 32 + column)[None, :] + (readers << READERS)
        tl.store(target[:, None] + place, entry, mask=readers != 0)
        seen_both += tl.sum(both, axis=1)
        seen_first += tl.sum(first, axis=1)
        seen_second += tl.sum(second, axis=1)
