"""Attention in which each block of queries reads its own list of key blocks (§5.4).

    out_i = Σ_j p_ij v_j,  p_ij = exp(scale · q_i·k_j - lse_i),  lse_i = log Σ_j exp(scale · q_i·k_j)

over the tokens j of the key blocks that the block of token i reads. Sums are float32 (float64 for float64).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask, check_lists
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.nabla_mask import check_tokens
from k5kernels.token_layout import TokenLayout, block_tokens, from_blocks, to_blocks

# Scores in work at a time: bounds the memory beyond inputs and outputs, and stays near the cache.
CHUNK = 1 << 20
# A tile of the Triton kernels holds whole heads; wider ones would not fit in registers.
ACCEPTS = {"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES, largest_head_dim=128)}


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, layout: TokenLayout, scale: float | None = None
) -> Tensor:
    """Attention over the kept blocks: [B, h, S, D] in the dtype of q; zeros where a query block reads nothing.

    q, k, v: [B, h, S, D] in fractal order, one floating dtype (under autocast all but float64 are cast to its
    dtype, as in scaled_dot_product_attention). mask: with B or 1 batches and h or 1 heads. scale: 1/sqrt(D) where None.
    Differentiable once in q, k and v.

    Raises ValueError where a shape, dtype, device or layout does not fit, RuntimeError where a list of the mask points
    at what is not there (the GPU kernels trust the mask: to ask would mean to wait for the GPU). Bit-reproducible on
    the CPU; the gradients of k and v in the reference on a GPU are not.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
    check_tokens("q", q, layout)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(
                f"{name}: expected {q.dtype} {list(q.shape)} like q, got {tensor.dtype} {list(tensor.shape)}"
            )
    _check_mask(mask, q, layout)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    starts = layout.block_starts(q.device)
    return torch.ops.k5.block_sparse_attention(q, k, v, mask.offsets, mask.indices, starts, scale)[0]


def _autocast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _check_mask(mask: BlockMask, q: Tensor, layout: TokenLayout) -> None:
    if mask.layout is not layout and mask.layout != layout:
        raise ValueError(f"mask: expected one for {layout}, got one for {mask.layout}")
    batch, heads = mask.offsets.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise ValueError(
            f"mask: expected {q.shape[0]} or 1 batches and {q.shape[1]} or 1 heads like q, got {batch} and {heads}"
        )
    if mask.offsets.device != q.device:
        raise ValueError(f"mask: expected it on {q.device} like q, got it on {mask.offsets.device}")


def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, indices: Tensor, block_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: (out, lse); lse float32 or better [B, h, S], -inf where nothing is read."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (_flat_blocks(x, block_starts) for x in (q, k, v))
        out = torch.zeros_like(queries)
        lse = queries.new_full(queries.shape[:2], -torch.inf)
        for rows, key_blocks, hidden in _chunks(q.shape, queries.dtype, offsets, indices, block_starts):
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype, from the probabilities that lse gives back.

    dv_j = Σ_i p_ij dout_i,  ds_ij = p_ij (dout_i·v_j - dout_i·out_i + dlse_i),
    dq_i = scale Σ_j ds_ij k_j,  dk_j = scale Σ_i ds_ij q_i
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (_flat_blocks(x, block_starts) for x in (q, k, v))
        grads, outs = (_flat_blocks(x, block_starts) for x in (grad_out, out))
        lse_blocks = _flat_blocks(lse[..., None], block_starts)
        shift = (grads * outs).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift = shift - _flat_blocks(grad_lse[..., None], block_starts)
        grad_q, grad_k, grad_v = (torch.zeros_like(blocks) for blocks in (queries, keys, values))
        for rows, key_blocks, hidden in _chunks(q.shape, queries.dtype, offsets, indices, block_starts):
            read_keys, read_values = (_read(blocks, key_blocks) for blocks in (keys, values))
            p = (_scores(queries[rows], read_keys, hidden, scale) - lse_blocks[rows]).exp_()
            _add_to_blocks(grad_v, key_blocks, p.mT @ grads[rows])
            ds = (grads[rows] @ read_values.mT).sub_(shift[rows]).mul_(p).mul_(scale)
            grad_q[rows] = ds @ read_keys
            _add_to_blocks(grad_k, key_blocks, ds.mT @ queries[rows])
        grad_q, grad_k, grad_v = (_tokens(blocks, q, block_starts).to(q.dtype) for blocks in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v


def _flat_blocks(x: Tensor, block_starts: Tensor) -> Tensor:
    """[B, h, S, D] to float32 or better [B·h·N_b + 1, P², D]; the last block is zeros, for the slots of no block."""
    blocks = to_blocks(x.to(torch.promote_types(x.dtype, torch.float32)), block_starts).flatten(0, 2)
    return torch.cat([blocks, torch.zeros_like(blocks[:1])])


def _tokens(blocks: Tensor, like: Tensor, block_starts: Tensor) -> Tensor:
    """The inverse of `_flat_blocks`: [B, h, S, ...]."""
    return from_blocks(blocks[:-1].unflatten(0, (*like.shape[:2], block_starts.shape[0] - 1)), block_starts)


def _chunks(
    shape: torch.Size, dtype: torch.dtype, offsets: Tensor, indices: Tensor, block_starts: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that read something, those with lists of about one length together, as many as CHUNK scores allow.

    Yields numbers of blocks in `_flat_blocks`: the rows [C], their key blocks [C, L], and what to add to scores:
    [C, 1, L·P²], 0 for a key token and -inf where there is none.
    """
    blocks = block_starts.shape[0] - 1
    check_lists(offsets, indices, blocks)
    empty_slot = shape[0] * shape[1] * blocks
    _, there = block_tokens(block_starts)
    hidden = torch.zeros(there.shape, dtype=dtype, device=there.device).masked_fill_(~there, -torch.inf)
    offsets = offsets.expand(shape[0], shape[1], -1)
    starts, counts = offsets[..., :-1].flatten(), offsets.diff(dim=-1).flatten()
    descending, order = counts.sort(descending=True, stable=True)
    lengths = descending[descending > 0].tolist()
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        last = min(len(lengths), first + max(1, CHUNK // (longest * there.shape[1] ** 2)))
        rows = order[first:last]
        slots = torch.arange(longest, device=rows.device)
        used = slots < counts[rows, None]
        read = indices[(starts[rows, None] + slots).where(used, 0)].long()
        key_blocks = (rows[:, None] // blocks * blocks + read).where(used, empty_slot)
        yield rows, key_blocks, hidden[read].masked_fill_(~used[..., None], -torch.inf).flatten(1)[:, None]
        first = last


def _read(blocks: Tensor, numbers: Tensor) -> Tensor:
    """The tokens of the blocks numbered [C, L], one block after another: [C, L·P², D]."""
    return blocks.index_select(0, numbers.flatten()).view(numbers.shape[0], -1, blocks.shape[-1])


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """scale · q·k, -inf where there is no key: [C, P², L·P²]."""
    return torch.baddbmm(hidden, queries, keys.mT, alpha=scale)


def _add_to_blocks(blocks: Tensor, numbers: Tensor, values: Tensor) -> None:
    """blocks[numbers[c, l]] += values[c, l]; values: [C, L·P², D]."""
    blocks.flatten(1).index_add_(0, numbers.flatten(), values.reshape(numbers.numel(), -1))


def _fake(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, indices: Tensor, block_starts: Tensor, scale: float
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    q, k, v, offsets, indices, block_starts = tensors
    ctx.save_for_backward(q, k, v, *output, offsets, indices, block_starts)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    saved = ctx.saved_tensors  # read once: activation checkpointing unpacks a tensor one time only
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    grads = torch.ops.k5.block_sparse_attention_backward(grad_out, grad_lse, *saved, ctx.scale)
    return *grads, None, None, None, None


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
