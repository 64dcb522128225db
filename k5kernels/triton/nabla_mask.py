"""NABLA's block mask on the GPU: pool, compute logits, then select in each row without a sort.

Non-negative floats have the order of their bits, so the probability at which the dropped mass is reached is found by
bisection over bits. Its sums are of 62-bit fixed-point numbers: exact to 2^-62 for each block, and the same in any
order. Of the N_b² blocks of a head only bits are stored, and the logits of CHUNK of them at a time.
"""

import math
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.block_mask import row_offsets
from k5kernels.triton.block_mask import bits_to_lists, lists_to_bits
from k5kernels.triton.launch import launch

# Logits in memory at a time: 64 MiB. At Pro's longest clip that is enough programs for all multiprocessors; of Lite's
# logits it is less than a third.
CHUNK = 1 << 24
# Of one program that computes logits: query blocks, key blocks at a time, elements of D at a time.
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 32, 64, 16
LOGITS_WARPS = 4
POOLED_TOKENS = 16
# Probabilities that one program selects from, at most, unless a single row has more.
SELECTED_CELLS = 4096
FIXED_POINT_BITS = 62

FIXED_POINT_ONE = tl.constexpr(float(1 << FIXED_POINT_BITS))


def nabla_mask(
    q: Tensor,
    k: Tensor,
    block_starts: Tensor,
    clip_block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    thr: float,
    sta_offsets: Tensor | None,
    sta_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(offsets, indices) of `BlockMask`, as in `k5kernels.ops.nabla_mask`. Bit-reproducible.

    The host waits for the device: only the data tells the length of the lists. `nabla_bits` does not wait.
    """
    bits, offsets = nabla_bits(
        q, k, block_starts, clip_block_starts, max_block_tokens, max_clip_blocks, thr, sta_offsets, sta_indices
    )
    return offsets, bits_to_lists(bits, offsets, int(offsets.diff(dim=-1).sum()))


def nabla_bits(
    q: Tensor,
    k: Tensor,
    block_starts: Tensor,
    clip_block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    thr: float,
    sta_offsets: Tensor | None,
    sta_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(bits, offsets) as in `k5kernels.ops.nabla_mask`. Bit-reproducible; the host does not wait for the device."""
    blocks = block_starts.shape[0] - 1
    key_starts, key_counts = keys_of_rows(clip_block_starts, blocks)
    near = None
    if sta_offsets is not None and sta_indices is not None:
        near = lists_to_bits(sta_offsets, sta_indices)[0, 0]
    queries, keys = pool(q, block_starts), pool(k, block_starts)
    kept, counts = select(
        queries, keys, key_starts, key_counts, clip_block_starts.shape[0] - 1, max_clip_blocks, thr, near
    )
    return kept.view(*q.shape[:2], *kept.shape[1:]), row_offsets(counts.view(*q.shape[:2], blocks))


def keys_of_rows(clip_block_starts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each query block the first key block of its clip, and how many there are: int64 [N_b] both."""
    lengths = clip_block_starts.diff()
    starts = clip_block_starts[:-1].repeat_interleave(lengths, output_size=blocks)
    return starts, lengths.repeat_interleave(lengths, output_size=blocks)


def pool(x: Tensor, block_starts: Tensor) -> Tensor:
    """Means over the tokens of each block: [B, h, S, D] to float32 [B·h, N_b, D]."""
    B, h, _, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = block_starts.shape[0] - 1
    pooled = x.new_empty(B * h, blocks, D, dtype=torch.float32)
    launch(
        pool_kernel, (blocks, B * h), x, block_starts, pooled, *x.stride()[:3], h, blocks,
        D=D, WIDTH=triton.next_power_of_2(D), TOKENS=POOLED_TOKENS, num_warps=2,
    )  # fmt: skip
    return pooled


def select(
    queries: Tensor,
    keys: Tensor,
    key_starts: Tensor,
    key_counts: Tensor,
    clips: int,
    max_clip_blocks: int,
    thr: float,
    near: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What each query block keeps: bits, int32 [B·h, N_b, words], and how many are set, int64 [B·h, N_b].

    queries, keys: pooled. key_starts, key_counts: of `keys_of_rows`. near: bits of the blocks that every head keeps,
    int32 [N_b, words], or None.
    """
    heads, blocks, D = queries.shape
    words = triton.cdiv(blocks, 32)
    # A row writes the words of its clip, which with one clip are all there are.
    kept = (queries.new_empty if clips == 1 else queries.new_zeros)(heads, blocks, words, dtype=torch.int32)
    counts = queries.new_empty(heads, blocks, dtype=torch.int64)
    tiles = triton.cdiv(blocks, TILE_ROWS)
    items, step = logits_at_once(heads * tiles, max_clip_blocks)
    logits = queries.new_empty(items * TILE_ROWS, step)
    # Columns of a row begin with a whole word: with those of a clip there may be 31 of the clip before it.
    columns, rows, warps = whole_row_tile(max_clip_blocks if clips == 1 else max_clip_blocks + 31)
    for first in range(0, heads * tiles, items):
        programs = min(items, heads * tiles - first)
        launch(
            logits_kernel, (programs,),
            queries, keys, key_starts, key_counts, logits, first, tiles, blocks, step, 1 / math.sqrt(D),
            D=D, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, DEPTH=TILE_DEPTH, num_warps=LOGITS_WARPS,
        )  # fmt: skip
        launch(
            select_kernel, (programs * TILE_ROWS // rows,),
            logits, key_starts, key_counts, near, kept, counts, first, tiles, blocks, step, words, dropped_mass(thr),
            TILE=TILE_ROWS, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return kept, counts


def logits_at_once(tiles: int, max_clip_blocks: int) -> tuple[int, int]:
    """Tiles of TILE_ROWS rows whose logits are in memory together, and the distance between two rows."""
    step = triton.cdiv(max_clip_blocks, 16) * 16
    return max(1, min(CHUNK // (TILE_ROWS * step), tiles)), step


def dropped_mass(thr: float) -> int:
    """The smallest fixed-point sum that is at least 1 - thr after rounding both to float32."""
    target = torch.tensor(1 - thr, dtype=torch.float32)
    if target == 0:
        return 0
    below = torch.nextafter(target, torch.zeros(()))
    middle = (Fraction(target.item()) + Fraction(below.item())) / 2 * (1 << FIXED_POINT_BITS)
    even = target.view(torch.int32).item() % 2 == 0  # a sum halfway between two floats rounds to the even one
    return math.ceil(middle) if even else math.floor(middle) + 1


def whole_row_tile(max_clip_blocks: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program that holds whole rows."""
    columns = max(32, triton.next_power_of_2(max_clip_blocks))
    rows = max(1, min(TILE_ROWS, SELECTED_CELLS // columns))
    return columns, rows, max(1, min(32, rows * columns // 512))


@triton.jit
def pool_kernel(
    x, block_starts, pooled, stride_b, stride_h, stride_s, heads, blocks,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The mean of one block of one head."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(block_starts + block)
    end = tl.load(block_starts + block + 1)
    source = x + head // heads * stride_b + head % heads * stride_h
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(start, end, TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)
        there = (token < end)[:, None] & (d < D)[None, :]
        values = tl.load(source + token[:, None] * stride_s + d[None, :], mask=there, other=0.0)
        total += tl.sum(values.to(tl.float32), axis=0)
    mean = tl.div_rn(total, tl.zeros([WIDTH], tl.float32) + (end - start).to(tl.float32))
    tl.store(pooled + (head * blocks + block) * D + d, mean, mask=d < D)


# first_item differs between the launches of one map: they share a compiled kernel.
@triton.jit(do_not_specialize=["first_item"])
def logits_kernel(
    queries, keys, key_starts, key_counts, logits, first_item, tiles, blocks, step, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of query blocks with the key blocks of their clips; column 0 is a clip's first key block."""
    item = tl.program_id(0)
    head = ((first_item + item) // tiles).to(tl.int64)
    block = (first_item + item) % tiles * ROWS + tl.arange(0, ROWS)
    there = block < blocks
    start = tl.load(key_starts + block, mask=there, other=blocks)
    end = start + tl.load(key_counts + block, mask=there, other=0)
    last_key = tl.max(tl.where(there, end, 0), axis=0)
    target = logits + (item.to(tl.int64) * ROWS + tl.arange(0, ROWS)) * step
    queries += head * blocks * D
    keys += head * blocks * D
    depth = tl.arange(0, DEPTH)
    for first_key in range(tl.min(start, axis=0), last_key, COLUMNS):
        key = first_key + tl.arange(0, COLUMNS)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, D, DEPTH):
            d = first + depth
            inside = d < D
            a = tl.load(queries + block[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            b = tl.load(
                keys + key[None, :] * D + d[:, None], mask=(key < last_key)[None, :] & inside[:, None], other=0.0
            )
            products = tl.dot(a, b, products, input_precision="ieee")
        own = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        tl.store(target[:, None] + (key[None, :] - start[:, None]), products * scale, mask=own)


@triton.jit(do_not_specialize=["first_item", "dropped"])
def select_kernel(
    logits, key_starts, key_counts, near, kept, counts, first_item, tiles, blocks, step, words, dropped: tl.int64,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Softmax of whole rows, and the bits of what they keep in the words of their clip.

    Dropped are the smallest, whose sum stays below `dropped`. The largest is kept even where the sum of all rounds
    below it.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = first_item + row // TILE
    block = item % tiles * TILE + row % TILE
    there = block < blocks
    target = (item // tiles).to(tl.int64) * blocks + block
    start = tl.load(key_starts + block, mask=there, other=0).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    key = column[None, :] - (start % 32)[:, None]  # of the row's clip
    inside = (key >= 0) & (key < tl.load(key_counts + block, mask=there, other=0)[:, None])
    values = tl.load(logits + row.to(tl.int64)[:, None] * step + key, mask=inside, other=float("-inf"))
    weights = tl.where(inside, tl.exp(values - tl.max(values, axis=1)[:, None]), 0.0)
    total = tl.sum(weights, axis=1)
    probabilities = tl.div_rn(weights, tl.broadcast_to(total[:, None], [ROWS, COLUMNS]))
    order = probabilities.to(tl.int32, bitcast=True)
    mass = (probabilities * FIXED_POINT_ONE).to(tl.int64)
    # The smallest bits for which the sum of all probabilities up to them reaches the dropped mass.
    low = tl.zeros([ROWS], tl.int32)
    high = tl.max(order, axis=1)
    for _ in range(31):
        middle = (low + high) // 2
        reached = tl.sum(tl.where(order <= middle[:, None], mass, 0), axis=1) >= dropped
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, tl.minimum(middle + 1, high))
    tied = inside & (order == low[:, None])
    below = tl.sum(tl.where(order < low[:, None], mass, 0), axis=1)
    share = tl.max(tl.where(tied, mass, 0), axis=1)
    dropped_ties = tl.where(share > 0, (dropped - below - 1) // tl.maximum(share, 1), 0)
    dropped_ties = tl.minimum(dropped_ties, tl.sum(tied.to(tl.int64), axis=1) - 1)
    place = tl.cumsum(tied.to(tl.int32), axis=1)
    keep = (order > low[:, None]) | (tied & (place > dropped_ties[:, None])) | (total != total)[:, None]
    if near is not None:
        at = near + block.to(tl.int64)[:, None] * words + (start // 32)[:, None] + column[None, :] // 32
        word = tl.load(at, mask=inside, other=0)
        keep |= (word >> (column % 32)[None, :]) & 1 != 0
    keep = keep & inside
    bits = tl.reshape(keep.to(tl.int32) << (column % 32)[None, :], [ROWS, COLUMNS // 32, 32])
    word = (start // 32)[:, None] + tl.arange(0, COLUMNS // 32)[None, :]
    some = tl.max(tl.reshape(inside.to(tl.int32), [ROWS, COLUMNS // 32, 32]), axis=2) > 0
    tl.store(kept + target[:, None] * words + word, tl.sum(bits, axis=2), mask=some)
    tl.store(counts + target, tl.sum(keep.to(tl.int32), axis=1).to(tl.int64), mask=there)
