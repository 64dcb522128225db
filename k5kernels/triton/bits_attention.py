"""Attention over a mask of bits on the GPU: the kernels of `block_sparse_attention` over lists made for a moment.

The number of kept blocks is known to the device alone. Lists that hold whatever a mask may keep need 4·N_b² bytes a
head: 8.6 MB of Lite's 10 s (N_b 1,464) and 53.6 MB of Pro's 10 s in HD (N_b 3,660), which for 28 and for 32 heads are
240 MB and 1.7 GB, against 7.5 MB and 53.6 MB for the bits of all heads. So the bits are what is kept for the backward,
and lists are made of as many heads at a time as LISTED_ENTRIES allows, in memory that is free again after the call.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from k5kernels.triton.block_mask import bits_to_lists, transposed_bits_to_lists
from k5kernels.triton.block_sparse_attention import attend, differentiate

# 256 MiB of int32: all heads of Lite's 10 s at once, and 5 of Pro's 10 s in HD, whose 18,300 query blocks at a time are
# still many for each multiprocessor.
LISTED_ENTRIES = 1 << 26

Part = tuple[slice, slice]  # samples, heads


def bits_attention(
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
    """(out, lse) as in `k5kernels.ops.bits_attention`. Bit-reproducible; the host does not wait for the device."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    for part, capacity in parts(q, bits, max_clip_blocks):
        own = places(offsets[part])
        indices = bits_to_lists(bits[part], own, capacity)
        attend(out[part], lse[part], q[part], k[part], v[part], own, indices, block_starts, max_block_tokens, scale)
    return out, lse


def bits_attention_backward(
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
    """Gradients of q, k and v, as in `k5kernels.ops.bits_attention`. Bit-reproducible; the host does not wait."""
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    for part, capacity in parts(q, bits, max_clip_blocks):
        own = places(offsets[part])
        lists = (own, bits_to_lists(bits[part], own, capacity), *transposed_bits_to_lists(bits[part], capacity))
        grads = (grad_q[part], grad_k[part], grad_v[part])
        own_grad_lse = None if grad_lse is None else grad_lse[part]
        differentiate(
            grads, grad_out[part], own_grad_lse, q[part], k[part], v[part], out[part], lse[part], *lists,
            block_starts, max_block_tokens, scale,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def parts(q: Tensor, bits: Tensor, max_clip_blocks: int) -> Iterator[tuple[Part, int]]:
    """Samples and heads whose lists are made together, and how many entries these may have.

    All at once where they fit, else heads of one sample at a time, of which contiguous tensors are contiguous parts.
    """
    B, h = q.shape[:2]
    if q.numel() == 0:
        return
    largest = bits.shape[2] * max_clip_blocks  # entries of a head
    at_once = max(1, LISTED_ENTRIES // largest)
    if B * h <= at_once:
        yield (slice(None), slice(None)), B * h * largest
        return
    heads = triton.cdiv(h, triton.cdiv(h, at_once))
    for sample in range(B):
        for first in range(0, h, heads):
            last = min(first + heads, h)
            yield (slice(sample, sample + 1), slice(first, last)), (last - first) * largest


def places(offsets: Tensor) -> Tensor:
    """Offsets of some heads, from 0 on."""
    return offsets - offsets[:1, :1, :1]
