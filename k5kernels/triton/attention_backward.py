"""The backward kernels of block-sparse attention, which `k5kernels.triton.block_sparse_attention` launches."""

import triton
import triton.language as tl

from k5kernels.triton.attention_tiles import LN_2, load_rows, load_tile, store_rows, token_range


@triton.jit
def row_shift_kernel(
    grad_out, out, grad_lse, shift,
    g_stride_b, g_stride_h, g_stride_s, o_stride_b, o_stride_h, o_stride_s, heads, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dout·out - dlse of TOKENS tokens of one head."""
    first = tl.program_id(0) * TOKENS
    head_number = tl.program_id(1).to(tl.int64)
    sample = head_number // heads
    head = head_number % heads
    grads = load_rows(
        grad_out + sample * g_stride_b + head * g_stride_h, g_stride_s, first, tokens, D, WIDTH, TOKENS, False
    )
    outs = load_rows(out + sample * o_stride_b + head * o_stride_h, o_stride_s, first, tokens, D, WIDTH, TOKENS, False)
    total = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
    token = first + tl.arange(0, TOKENS)
    there = token < tokens
    if grad_lse is not None:
        total -= tl.load(grad_lse + head_number * tokens + token, mask=there, other=0.0)
    tl.store(shift + head_number * tokens + token, total, mask=there)


@triton.jit
def backward_queries_kernel(
    q, k, v, grad_out, lse, shift, grad_q, offsets, indices, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_s, heads, tokens, blocks, mask_stride_b, mask_stride_h, scale, exponent_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """dq of one tile of one query block, from the key blocks it reads. exponent_scale: scale times log2(e)."""
    block = tl.program_id(0) // TILES
    head_number = tl.program_id(1).to(tl.int64)
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    first, end = token_range(block_starts, block, tl.program_id(0) % TILES, TILE, TILES, FULL)
    q += sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    grad_out += sample.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    queries = load_rows(q, q_stride_s, first, end, D, WIDTH, TILE, FULL)
    grads = load_rows(grad_out, g_stride_s, first, end, D, WIDTH, TILE, FULL)
    row = first + tl.arange(0, TILE)
    exponent = tl.load(lse + head_number * tokens + row, mask=row < end, other=0.0) / LN_2
    shifts = tl.load(shift + head_number * tokens + row, mask=row < end, other=0.0)
    if not TMA:
        k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    list_start = offsets + sample.to(tl.int64) * mask_stride_b + head * mask_stride_h + block
    start = tl.load(list_start)
    count = (tl.load(list_start + 1) - start).to(tl.int32)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for step in tl.range(0, count * TILES):
        key_block = tl.load(indices + start + step // TILES)
        key, key_end = token_range(block_starts, key_block, step % TILES, TILE, TILES, FULL)
        keys = load_tile(k, k_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        values = load_tile(v, v_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * exponent_scale
        p = tl.exp2(scores - exponent[:, None])
        if not FULL:
            p = tl.where((key + tl.arange(0, TILE) < key_end)[None, :], p, 0.0)
        grad_scores = p * (tl.dot(grads, tl.trans(values), input_precision="ieee") - shifts[:, None])
        total = tl.dot(grad_scores.to(keys.dtype), keys, total, input_precision="ieee")
    target = grad_q + head_number * tokens * D
    store_rows(target, (total * scale).to(grad_q.dtype.element_ty), first, end, D, WIDTH, TILE, FULL)


@triton.jit
def backward_keys_kernel(
    q, k, v, grad_out, lse, shift, grad_k, grad_v, offsets, readers, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_s, heads, tokens, blocks, mask_stride_b, mask_stride_h, scale, exponent_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of one key block, from the query blocks that read it. Scores are [keys, queries]."""
    block = tl.program_id(0) // TILES
    head_number = tl.program_id(1).to(tl.int64)
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    first, end = token_range(block_starts, block, tl.program_id(0) % TILES, TILE, TILES, FULL)
    k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    keys = load_rows(k, k_stride_s, first, end, D, WIDTH, TILE, FULL)
    values = load_rows(v, v_stride_s, first, end, D, WIDTH, TILE, FULL)
    if not TMA:
        q += sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        grad_out += sample.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    lse += head_number * tokens
    shift += head_number * tokens
    list_start = offsets + sample.to(tl.int64) * mask_stride_b + head * mask_stride_h + block
    start = tl.load(list_start)
    count = (tl.load(list_start + 1) - start).to(tl.int32)
    total_k = tl.zeros([TILE, WIDTH], tl.float32)
    total_v = tl.zeros([TILE, WIDTH], tl.float32)
    for step in tl.range(0, count * TILES):
        query_block = tl.load(readers + start + step // TILES)
        query, query_end = token_range(block_starts, query_block, step % TILES, TILE, TILES, FULL)
        # Rows beyond the end of a block are zeros and add zero.
        queries = load_tile(q, q_stride_s, sample, head, query, query_end, D, WIDTH, TILE, FULL, TMA)
        grads = load_tile(grad_out, g_stride_s, sample, head, query, query_end, D, WIDTH, TILE, FULL, TMA)
        row = query + tl.arange(0, TILE)
        exponent = tl.load(lse + row, mask=row < query_end, other=0.0) / LN_2
        shifts = tl.load(shift + row, mask=row < query_end, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * exponent_scale
        p = tl.exp2(scores - exponent[None, :])
        total_v = tl.dot(p.to(grads.dtype), grads, total_v, input_precision="ieee")
        grad_scores = p * (tl.dot(values, tl.trans(grads), input_precision="ieee") - shifts[None, :])
        total_k = tl.dot(grad_scores.to(queries.dtype), queries, total_k, input_precision="ieee")
    base = head_number * tokens * D
    store_rows(grad_k + base, (total_k * scale).to(grad_k.dtype.element_ty), first, end, D, WIDTH, TILE, FULL)
    store_rows(grad_v + base, total_v.to(grad_v.dtype.element_ty), first, end, D, WIDTH, TILE, FULL)
