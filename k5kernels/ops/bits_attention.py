"""Attention over a mask of bits, as `nabla_attention` runs it on a GPU: shapes that no value on the device decides.

The lists of a `BlockMask` have a length, for which the host would wait; bits have N_b² of them a head. Otherwise this
is `block_sparse_attention`, to the bit.
"""

import math

import torch
from torch import Tensor

from k5kernels.block_mask import bits_to_dense
from k5kernels.ops.block_sparse_attention import (
    ACCEPTS,
    block_sparse_attention_backward_reference,
    block_sparse_attention_reference,
    checked_tokens,
)
from k5kernels.ops.library import register
from k5kernels.token_layout import TokenLayout


def bits_attention(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, offsets: Tensor, layout: TokenLayout, scale: float | None = None
) -> Tensor:
    """Attention over the blocks whose bits are set: [B, h, S, D] in the dtype of q.

    q, k, v: as in `block_sparse_attention`. bits, offsets: of `nabla_bits`, for B samples and h heads. Differentiable
    once in q, k and v. Bit-reproducible, as `block_sparse_attention` is.
    """
    q, k, v = checked_tokens(q, k, v, layout)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sizes = (layout.max_block_tokens, layout.max_clip_blocks)
    return torch.ops.k5.bits_attention(q, k, v, bits, offsets, layout.block_starts(q.device), *sizes, scale)[0]


def bits_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    offsets: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: (out, lse) of `block_sparse_attention` over the lists of the bits.

    bits: int32 [B, h, N_b, ceil(N_b / 32)]. offsets: where the list of each row begins and ends, int64
    [B, h, N_b + 1]. max_clip_blocks: of the layout, the most bits that a row may have set.
    """
    return block_sparse_attention_reference(q, k, v, offsets, _indices(bits), block_starts, max_block_tokens, scale)


def bits_attention_backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    offsets: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype."""
    return block_sparse_attention_backward_reference(
        grad_out, grad_lse, q, k, v, out, lse, offsets, _indices(bits), block_starts, max_block_tokens, scale
    )


def _indices(bits: Tensor) -> Tensor:
    """The key blocks whose bits are set, row after row."""
    return bits_to_dense(bits).nonzero()[:, -1].to(torch.int32)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    offsets: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
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
    bits: Tensor,
    offsets: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.max_block_tokens, ctx.max_clip_blocks, ctx.scale = inputs
    q, k, v, bits, offsets, block_starts = tensors
    ctx.save_for_backward(q, k, v, *output, bits, offsets, block_starts)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives each saved tensor only once
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    sizes = (ctx.max_block_tokens, ctx.max_clip_blocks, ctx.scale)
    grads = torch.ops.k5.bits_attention_backward(grad_out, grad_lse, *saved, *sizes)
    return *grads, None, None, None, None, None, None


# There is no kernel for the CPU, where nothing waits and lists serve.
ON_GPUS = {"cuda": ACCEPTS["cuda"]}

register(
    bits_attention_reference,
    _fake,
    _backward,
    _setup_context,
    accepts=ON_GPUS,
)
register(
    bits_attention_backward_reference,
    _backward_fake,
    accepts=ON_GPUS,
)
