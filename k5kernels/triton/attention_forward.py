"""The forward kernel of block-sparse attention, which `k5kernels.triton.block_sparse_attention` launches."""

import triton
import triton.language as tl

from k5kernels.triton.attention_tiles import LN_2, load_rows, load_tile, store_rows, token_range


@triton.jit
def softmax_step(scores, values, top, total, weighted):
    """Add a tile to an online softmax: the new maximum, sum of weights and weighted values of each row.

    scores: in base 2. A maximum of -inf (no score above -inf so far) gives weights of zero and not NaN.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(weights, axis=1)
    weighted = tl.dot(weights.to(values.dtype), values, weighted * rescale[:, None], input_precision="ieee")
    return new_top, total, weighted


@triton.jit
def store_attention(
    out, lse, top, total, weighted, reads, head_number, tokens, first, end,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Divide by the sums of weights, and store the output and lse.

    A row that reads nothing gets zeros and an lse of -inf, a row with no score but -inf gets NaN, as in the definition.
    PART: of the keys alone, where such a row has an lse of -inf, for another part may have other scores.
    """
    mean = tl.where(reads[:, None], tl.div_rn(weighted, tl.broadcast_to(total[:, None], [ROWS, WIDTH])), 0.0)
    store_rows(out + head_number * tokens * D, mean.to(out.dtype.element_ty), first, end, D, WIDTH, ROWS, FULL)
    row = first + tl.arange(0, ROWS)
    logarithm = tl.where(total == 0, float("-inf") if PART else float("nan"), (top + tl.log2(total)) * LN_2)
    tl.store(lse + head_number * tokens + row, tl.where(reads, logarithm, float("-inf")), mask=row < end)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, offsets, indices, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    heads, tokens, blocks, mask_stride_b, mask_stride_h, scale, order,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
    TILES: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """One tile of one query block. scale: times log2(e). order: of the blocks of a head, or None.

    RANGES: 1 with the offsets of the lists; else offsets are those of `split_lists`, and what is stored is the result
    of one range of keys, the ranges of a head one after another.
    """
    block = tl.program_id(0) // TILES
    target = tl.program_id(1).to(tl.int64)
    head_number = target // RANGES
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    if order is not None:
        block = tl.load(order + head_number * blocks + block)
    list_start = offsets + sample.to(tl.int64) * mask_stride_b + head * mask_stride_h
    if RANGES == 1:
        list_start += block
    else:
        list_start += block * (RANGES + 1) + target % RANGES
    first, end = token_range(block_starts, block, tl.program_id(0) % TILES, TILE, TILES, FULL)
    queries = load_rows(
        q + sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h, q_stride_s, first, end,
        D, WIDTH, TILE, FULL,
    )  # fmt: skip
    if not TMA:
        k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    start = tl.load(list_start)
    count = (tl.load(list_start + 1) - start).to(tl.int32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE, WIDTH], tl.float32)
    for step in tl.range(0, count * TILES):
        key_block = tl.load(indices + start + step // TILES)
        key, key_end = token_range(block_starts, key_block, step % TILES, TILE, TILES, FULL)
        keys = load_tile(k, k_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if not FULL:
            scores = tl.where((key + tl.arange(0, TILE) < key_end)[None, :], scores, float("-inf"))
        values = load_tile(v, v_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        top, total, weighted = softmax_step(scores, values, top, total, weighted)
    reads = tl.full([TILE], 1, tl.int32) * count > 0
    store_attention(out, lse, top, total, weighted, reads, target, tokens, first, end, D, WIDTH, TILE, FULL, RANGES > 1)
