"""Attention in which each block of queries reads its own list of key blocks (§5.4).

    out_i = Σ_j p_ij v_j,  p_ij = exp(scale · q_i·k_j - lse_i),  lse_i = log Σ_j exp(scale · q_i·k_j)

over the tokens j of the key blocks that the block of token i reads. Sums are in float32 (float64 for float64).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask, check_lists
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.nabla_mask import check_tokens
from k5kernels.token_layout import TokenLayout, block_tokens, from_blocks, to_blocks

# Scores that the reference computes at a time: this bounds its memory beyond inputs and outputs.
CHUNK = 1 << 20
# A tile of the Triton kernels holds all of D: more would not fit in registers.
ACCEPTS = {"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES, largest_head_dim=128)}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over the blocks that the mask keeps: [B, h, S, D] in the dtype of q.

    q, k, v: [B, h, S, D] in the fractal order of mask.layout, one floating dtype (under autocast all but float64 are
    cast to its dtype, as in scaled_dot_product_attention). mask: with B or 1 batches and h or 1 heads; a query block
    that reads no block gets zeros. layout: mask.layout; not needed, and checked where it is given. scale: of the
    scores, 1/sqrt(D) where None. Differentiable once in q, k and v.

    Raises ValueError where a shape, dtype, device or layout does not fit, RuntimeError where a list of the mask points
    outside the indices or the blocks (the GPU kernels do not check this: the host would have to wait for the answer).
    Bit-reproducible, forward and backward, except for the gradients of k and v where the reference runs on a GPU.
    """
    return block_sparse_attention_lse(q, k, v, mask, layout, scale)[0]


def block_sparse_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    layout: TokenLayout | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention`, and the log of each query's sum of exponentials of its scores, by which it is joined
    with attention to other keys: lse [B, h, S], float32, or float64 for float64. Arguments and errors are the same.
    """
    if layout is None:
        layout = mask.layout
    elif layout is not mask.layout and layout != mask.layout:  # torch.compile can compare the identity of any layout
        raise ValueError(f"layout: expected that of the mask, {mask.layout}, got {layout}; it can be left out")
    q, k, v = checked_tokens(q, k, v, layout)
    _check_mask(mask, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    blocks = (layout.block_starts(q.device), layout.max_block_tokens)
    return torch.ops.k5.block_sparse_attention(q, k, v, mask.offsets, mask.indices, *blocks, scale)


def checked_tokens(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype that attention computes in; ValueError where their shapes or dtypes do not fit."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
    check_tokens("q", q, layout)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(
                f"{name}: expected {q.dtype} {list(q.shape)} like q, got {tensor.dtype} {list(tensor.shape)}"
            )
    return q, k, v


def _autocast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _check_mask(mask: BlockMask, q: Tensor) -> None:
    batch, heads = mask.offsets.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise ValueError(
            f"mask: expected {q.shape[0]} or 1 batches and {q.shape[1]} or 1 heads like q, got {batch} and {heads}"
        )
    if mask.offsets.device != q.device:
        raise ValueError(f"mask: expected it on {q.device} like q, got it on {mask.offsets.device}")


def block_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: (out, lse).

    offsets, indices: of a `BlockMask`. block_starts, max_block_tokens: of its layout. lse: float32, or float64 for
    float64, [B, h, S]; -inf where nothing is read.
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (_flat_blocks(x, block_starts, max_block_tokens) for x in (q, k, v))
        out = torch.zeros_like(queries)
        lse = queries.new_full(queries.shape[:2], -torch.inf)
        chunks = _chunks(q.shape, queries.dtype, offsets, indices, block_starts, max_block_tokens)
        for rows, key_blocks, hidden in chunks:
            scores = _scores(queries[rows], _read(keys, key_blocks), hidden, scale)
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            lse[rows] = (top + total.log()).squeeze(-1)
            out[rows] = (weights @ _read(values, key_blocks)).div_(total)
        return _tokens(out, q, block_starts).to(q.dtype), _tokens(lse, q, block_starts)


def block_sparse_attention_backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype; the probabilities p are computed again from q, k and lse.

    dv_j = Σ_i p_ij dout_i,  ds_ij = p_ij (dout_i·v_j - dout_i·out_i + dlse_i),
    dq_i = scale Σ_j ds_ij k_j,  dk_j = scale Σ_i ds_ij q_i
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (_flat_blocks(x, block_starts, max_block_tokens) for x in (q, k, v))
        grads, outs = (_flat_blocks(x, block_starts, max_block_tokens) for x in (grad_out, out))
        lse_blocks = _flat_blocks(lse[..., None], block_starts, max_block_tokens)
        shift = (grads * outs).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift = shift - _flat_blocks(grad_lse[..., None], block_starts, max_block_tokens)
        grad_q, grad_k, grad_v = (torch.zeros_like(blocks) for blocks in (queries, keys, values))
        chunks = _chunks(q.shape, queries.dtype, offsets, indices, block_starts, max_block_tokens)
        for rows, key_blocks, hidden in chunks:
            read_keys, read_values = (_read(blocks, key_blocks) for blocks in (keys, values))
            p = (_scores(queries[rows], read_keys, hidden, scale) - lse_blocks[rows]).exp_()
            _add_to_blocks(grad_v, key_blocks, p.mT @ grads[rows])
            ds = (grads[rows] @ read_values.mT).sub_(shift[rows]).mul_(p).mul_(scale)
            grad_q[rows] = ds @ read_keys
            _add_to_blocks(grad_k, key_blocks, ds.mT @ queries[rows])
        grad_q, grad_k, grad_v = (_tokens(blocks, q, block_starts).to(q.dtype) for blocks in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v


def _flat_blocks(x: Tensor, block_starts: Tensor, max_block_tokens: int) -> Tensor:
    """[B, h, S, D] to float32, or float64 for float64, [B·h·N_b + 1, M, D]; M is max_block_tokens.

    The last block is zeros: rows of a chunk with shorter lists than its longest read it.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = to_blocks(x, block_starts, max_block_tokens).flatten(0, 2)
    return torch.cat([blocks, torch.zeros_like(blocks[:1])])


def _tokens(blocks: Tensor, like: Tensor, block_starts: Tensor) -> Tensor:
    """The inverse of `_flat_blocks`: [B, h, S, ...]."""
    blocks = blocks[:-1].unflatten(0, (*like.shape[:2], block_starts.shape[0] - 1))
    return from_blocks(blocks, block_starts, like.shape[2])


def _chunks(
    shape: torch.Size,
    dtype: torch.dtype,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query blocks that read something, sorted by the length of their lists, in chunks of about CHUNK scores.

    Yields, as numbers of blocks in `_flat_blocks`, C query blocks [C] and the L key blocks that each reads [C, L], and
    what to add to the scores: [C, 1, L·M], 0 for a key token and -inf where there is none.
    """
    blocks = block_starts.shape[0] - 1
    check_lists(offsets, indices, blocks)
    empty_slot = shape[0] * shape[1] * blocks
    _, exists = block_tokens(block_starts, max_block_tokens)
    hidden = torch.zeros(exists.shape, dtype=dtype, device=exists.device).masked_fill_(~exists, -torch.inf)
    offsets = offsets.expand(shape[0], shape[1], -1)
    starts, counts = offsets[..., :-1].flatten(), offsets.diff(dim=-1).flatten()
    descending, order = counts.sort(descending=True, stable=True)
    lengths = descending[descending > 0].tolist()
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        last = min(len(lengths), first + max(1, CHUNK // (longest * max_block_tokens**2)))
        rows = order[first:last]
        slots = torch.arange(longest, device=rows.device)
        used = slots < counts[rows, None]
        read = indices[(starts[rows, None] + slots).where(used, 0)].long()
        key_blocks = (rows[:, None] // blocks * blocks + read).where(used, empty_slot)
        yield rows, key_blocks, hidden[read].masked_fill_(~used[..., None], -torch.inf).flatten(1)[:, None]
        first = last


def _read(blocks: Tensor, numbers: Tensor) -> Tensor:
    """The tokens of the blocks with these numbers [C, L], block after block: [C, L·M, D]."""
    return blocks.index_select(0, numbers.flatten()).view(numbers.shape[0], -1, blocks.shape[-1])


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """scale · q·k, -inf where there is no key: [C, M, L·M]."""
    return torch.baddbmm(hidden, queries, keys.mT, alpha=scale)


def _add_to_blocks(blocks: Tensor, numbers: Tensor, values: Tensor) -> None:
    """blocks[numbers[c, l]] += values[c, l]; values: [C, L·M, D]."""
    blocks.flatten(1).index_add_(0, numbers.flatten(), values.reshape(numbers.numel(), -1))


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.max_block_tokens, ctx.scale = inputs
    q, k, v, offsets, indices, block_starts = tensors
    ctx.save_for_backward(q, k, v, *output, offsets, indices, block_starts)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives each saved tensor only once
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    sizes = (ctx.max_block_tokens, ctx.scale)
    grads = torch.ops.k5.block_sparse_attention_backward(grad_out, grad_lse, *saved, *sizes)
    return *grads, None, None, None, None, None


register(
    block_sparse_attention_reference,
    _fake,
    _backward,
    _setup_context,
    accepts=ACCEPTS,
)
register(
    block_sparse_attention_backward_reference,
    _backward_fake,
    accepts=ACCEPTS,
)
