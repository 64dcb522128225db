"""NABLA's block mask on the GPU: pool, compute logits on the tensor cores, then select in each row without a sort.

Logits. A float32 is the sum of three bf16, up to its last bit. Of the nine products of the parts of q and k the six
largest are added, which leaves the error of float32 products: the selection is that of float32 logits, where three
products (an error of 2^-16) would change it. Pooling writes the parts.

Selection. Non-negative floats have the order of their bits, so the probability at which the dropped mass is reached is
found by bisection over bits. Sums are of fixed-point numbers: the same in any order. Those of 30 bits come first; they
are rounded down, and a step is taken only where that cannot matter. What is left, mostly nothing, is decided by sums of
62 bits, exact to 2^-62 for each block. Of the N_b² blocks of a head only bits are stored, and the logits of CHUNK of
them at a time.
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
# Of one program that computes logits: query blocks, key blocks, elements of D at a time.
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 128, 64, 64
LOGITS_WARPS, LOGITS_STAGES = 8, 3
PARTS = 3
# Tokens that are loaded at a time: those of a whole block of the released models.
POOLED_TOKENS = 64
# Probabilities that one program selects from, at most, unless a single row has more; and those of each warp.
SELECTED_CELLS = 2048
WARP_CELLS = 512
FIXED_POINT_BITS, COARSE_BITS = 62, 30

FIXED_POINT_ONE = tl.constexpr(float(1 << FIXED_POINT_BITS))
COARSE_ONE = tl.constexpr(float(1 << COARSE_BITS))
# From the least probability that can be the one looked for to the largest there are some 2^26 floats.
COARSE_STEPS = tl.constexpr(16)
LARGEST_INT = tl.constexpr((1 << 31) - 1)


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
    queries, keys = (pool(x, block_starts, max_block_tokens) for x in (q, k))
    kept, counts = select(
        queries, keys, key_starts, key_counts, clip_block_starts.shape[0] - 1, max_clip_blocks, thr, near
    )
    return kept.view(*q.shape[:2], *kept.shape[1:]), row_offsets(counts.view(*q.shape[:2], blocks))


def keys_of_rows(clip_block_starts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each query block the first key block of its clip, and how many there are: int64 [N_b] both."""
    lengths = clip_block_starts.diff()
    starts = clip_block_starts[:-1].repeat_interleave(lengths, output_size=blocks)
    return starts, lengths.repeat_interleave(lengths, output_size=blocks)


def pool(x: Tensor, block_starts: Tensor, max_block_tokens: int) -> Tensor:
    """Means over the tokens of each block in float32, in three parts that add up to them.

    [B, h, S, D] to bf16 [3, B·h, N_b, D], the largest part first.
    """
    B, h, _, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = block_starts.shape[0] - 1
    pooled = x.new_empty(PARTS, B * h, blocks, D, dtype=torch.bfloat16)
    tokens = min(POOLED_TOKENS, triton.next_power_of_2(max_block_tokens))
    launch(
        pool_kernel, (B * h * blocks,), x, block_starts, pooled, *x.stride()[:3], B * h, h, blocks,
        D=D, WIDTH=triton.next_power_of_2(D), TOKENS=tokens, num_warps=4,
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

    queries, keys: of `pool`. key_starts, key_counts: of `keys_of_rows`. near: bits of the blocks that every head keeps,
    int32 [N_b, words], or None.
    """
    _, heads, blocks, D = queries.shape
    words = triton.cdiv(blocks, 32)
    # A row writes the words of its clip, which with one clip are all there are.
    kept = (queries.new_empty if clips == 1 else queries.new_zeros)(heads, blocks, words, dtype=torch.int32)
    counts = queries.new_empty(heads, blocks, dtype=torch.int64)
    tiles = triton.cdiv(blocks, TILE_ROWS)
    items, step = logits_at_once(heads * tiles, max_clip_blocks)
    logits = queries.new_empty(items * TILE_ROWS, step, dtype=torch.float32)
    # Columns of a row begin with a whole word: with those of a clip there may be 31 of the clip before it.
    columns, rows, warps = whole_row_tile(max_clip_blocks if clips == 1 else max_clip_blocks + 31)
    dropped = dropped_mass(thr)
    # A sum of n probabilities of at most p each reaches the dropped mass only where p is at least 1/n of it.
    least = dropped / (1 << FIXED_POINT_BITS) * (1 - 1e-6)
    for first in range(0, heads * tiles, items):
        programs = min(items, heads * tiles - first)
        launch(
            logits_kernel, (triton.cdiv(blocks, TILE_COLUMNS), programs),
            queries, keys, key_starts, key_counts, logits, first, heads, tiles, blocks, step, 1 / math.sqrt(D),
            D=D, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, DEPTH=TILE_DEPTH,
            num_warps=LOGITS_WARPS, num_stages=LOGITS_STAGES,
        )  # fmt: skip
        launch(
            select_kernel, (programs * TILE_ROWS // rows,),
            logits, key_starts, key_counts, near, kept, counts, first, tiles, blocks, step, words, dropped, least,
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
    return columns, rows, max(1, min(32, rows * columns // WARP_CELLS))


@triton.jit
def pool_kernel(
    x, block_starts, pooled, stride_b, stride_h, stride_s, all_heads, heads, blocks,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The mean of one block of one head. Programs of the heads of a block are neighbours, as they are in memory."""
    block = tl.program_id(0) // all_heads
    head = (tl.program_id(0) % all_heads).to(tl.int64)
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
    target = pooled + (head * blocks + block) * D + d
    part_size = all_heads.to(tl.int64) * blocks * D
    for part in tl.static_range(3):
        rounded = mean.to(tl.bfloat16)
        tl.store(target + part * part_size, rounded, mask=d < D)
        mean -= rounded.to(tl.float32)


@triton.jit
def add_products(
    products, queries, keys, block, key, blocks, part, first_pair, last_pair, D: tl.constexpr, DEPTH: tl.constexpr
):
    """Add the products of some of the six pairs of parts, the smallest first: one loop, as of a single product."""
    steps: tl.constexpr = (D + DEPTH - 1) // DEPTH
    depth = tl.arange(0, DEPTH)
    for step in range(first_pair * steps, last_pair * steps):
        pair = step // steps
        # Parts 2, 1, 0, 1, 0, 0 of the queries with parts 0, 1, 2, 0, 1, 0 of the keys: two bits a pair.
        of_queries = (70 >> (2 * pair)) & 3
        of_keys = (292 >> (2 * pair)) & 3
        d = step % steps * DEPTH + depth
        a = queries + of_queries * part + block[:, None] * D + d[None, :]
        b = keys + of_keys * part + key[None, :] * D + d[:, None]
        products = tl.dot(
            tl.load(a, mask=(block < blocks)[:, None] & (d < D)[None, :], other=0.0),
            tl.load(b, mask=(key < blocks)[None, :] & (d < D)[:, None], other=0.0),
            products,
        )
    return products


# first_item differs between the launches of one map: they share a compiled kernel.
@triton.jit(do_not_specialize=["first_item"])
def logits_kernel(
    queries, keys, key_starts, key_counts, logits, first_item, heads, tiles, blocks, step, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the logits of query blocks with the key blocks of their clips; column 0 is a clip's first key block."""
    item = tl.program_id(1)
    head = ((first_item + item) // tiles).to(tl.int64)
    block = (first_item + item) % tiles * ROWS + tl.arange(0, ROWS)
    key = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = block < blocks
    start = tl.load(key_starts + block, mask=there, other=blocks).to(tl.int32)
    end = start + tl.load(key_counts + block, mask=there, other=0).to(tl.int32)
    first_key = tl.min(start, axis=0)
    last_key = tl.max(tl.where(there, end, 0), axis=0)
    if (tl.max(key, axis=0) >= first_key) & (tl.min(key, axis=0) < last_key):
        queries += head * blocks * D
        keys += head * blocks * D
        part = heads.to(tl.int64) * blocks * D
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        products = add_products(products, queries, keys, block, key, blocks, part, 0, 5, D, DEPTH)
        # The smaller parts of an infinite mean are NaN; the product of the largest alone is that of the definition.
        products = tl.where(products - products == 0, products, 0.0)
        products = add_products(products, queries, keys, block, key, blocks, part, 5, 6, D, DEPTH)
        target = logits + item.to(tl.int64) * ROWS * step
        own = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        tl.store(target + (tl.arange(0, ROWS) * step - start)[:, None] + key[None, :], products * scale, mask=own)


@triton.jit
def exact_mass(probabilities):
    """Their sum along a row in fixed point: int64 [ROWS]."""
    return tl.sum((probabilities * FIXED_POINT_ONE).to(tl.int64), axis=1)


@triton.jit
def dropped_from(probabilities, inside, count, dropped, least, COLUMNS: tl.constexpr):
    """The bits of the smallest probability for which the sum of all up to it reaches `dropped`: int32 [ROWS].

    Of the largest, where the sum of all does not. count: of the probabilities of each row. A NaN gives any number.
    """
    order = probabilities.to(tl.int32, bitcast=True)
    mass = (probabilities * COARSE_ONE).to(tl.int32)
    high = tl.max(order, axis=1)
    low = tl.minimum((least / count.to(tl.float32)).to(tl.int32, bitcast=True), high)
    # Between rounded-down sums of n and the exact ones are less than n units.
    unit: tl.constexpr = 1 << 32
    wide = dropped.to(tl.int64)
    enough = ((wide + unit - 1) // unit).to(tl.int32)
    too_little = (wide // unit).to(tl.int32) - count
    for _ in range(COARSE_STEPS):
        middle = low + (high - low) // 2
        sums = tl.sum(tl.where(order <= middle[:, None], mass, 0), axis=1)
        high = tl.where(sums >= enough, middle, high)
        low = tl.where(sums <= too_little, tl.minimum(middle + 1, high), low)
    # What is looked for is one of the probabilities between the two, of which there is mostly one.
    while tl.max(high - low, axis=0) > 0:
        high = tl.max(tl.where(order <= high[:, None], order, 0), axis=1)
        low = tl.minimum(tl.min(tl.where(inside & (order >= low[:, None]), order, LARGEST_INT), axis=1), high)
        middle = low + (high - low) // 2
        reached = exact_mass(tl.where(order <= middle[:, None], probabilities, 0.0)) >= dropped
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, tl.minimum(middle + 1, high))
    return low


@triton.jit(do_not_specialize=["first_item", "dropped", "least"])
def select_kernel(
    logits, key_starts, key_counts, near, kept, counts, first_item, tiles, blocks, step, words, dropped: tl.int64,
    least: tl.float32, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Softmax of whole rows, and the bits of what they keep in the words of their clip.

    Dropped are the smallest, whose sum stays below `dropped`. The largest is kept even where the sum of all rounds
    below it. least: a lower bound of `dropped` as a float.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = first_item + row // TILE
    block = item % tiles * TILE + row % TILE
    there = block < blocks
    target = (item // tiles).to(tl.int64) * blocks + block
    start = tl.load(key_starts + block, mask=there, other=0).to(tl.int32)
    count = tl.load(key_counts + block, mask=there, other=0).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    key = column[None, :] - (start % 32)[:, None]  # of the row's clip
    inside = (key >= 0) & (key < count[:, None])
    values = tl.load(logits + row.to(tl.int64)[:, None] * step + key, mask=inside, other=float("-inf"))
    weights = tl.where(inside, tl.exp(values - tl.max(values, axis=1)[:, None]), 0.0)
    total = tl.sum(weights, axis=1)
    probabilities = tl.div_rn(weights, tl.broadcast_to(total[:, None], [ROWS, COLUMNS]))
    order = probabilities.to(tl.int32, bitcast=True)
    edge = dropped_from(probabilities, inside, count, dropped, least, COLUMNS)
    tied = inside & (order == edge[:, None])
    below = exact_mass(tl.where(order < edge[:, None], probabilities, 0.0))
    share = (edge.to(tl.float32, bitcast=True) * FIXED_POINT_ONE).to(tl.int64)
    dropped_ties = tl.where(share > 0, (dropped - below - 1) // tl.maximum(share, 1), 0)
    dropped_ties = tl.minimum(dropped_ties, tl.sum(tied.to(tl.int32), axis=1) - 1).to(tl.int32)
    undefined = (total != total)[:, None]
    keep = (order >= edge[:, None]) | undefined
    if tl.max(dropped_ties, axis=0) > 0:
        place = tl.cumsum(tied.to(tl.int32), axis=1)
        keep &= (place > dropped_ties[:, None]) | (order > edge[:, None]) | undefined
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
