"""NABLA attention: the mask from pooled queries and keys, then attention over the kept blocks (§5.4)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from k5kernels.attention.engine import Call, Engine
from k5kernels.block_mask import BlockMask
from k5kernels.ops.bits_attention import bits_attention
from k5kernels.ops.block_sparse_attention import block_sparse_attention
from k5kernels.ops.nabla_mask import nabla_bits, nabla_mask
from k5kernels.profiling import stage
from k5kernels.token_layout import TokenLayout

_observers: list[Callable[[BlockMask], None]] = []


def nabla_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, thr: float, sta: tuple[int, int, int] | None = None
) -> Tensor:
    """Self-attention that keeps the probability mass thr of each block row: [B, h, S, D] in the dtype of q.

    q, k, v: [B, h, S, D] in fractal order, one floating dtype. thr: 0 to 1; 1 is dense attention inside each clip.
    sta: a Sliding-Tile Attention window (w_T, w_H, w_W) in blocks, kept as well. Differentiable in q, k and v;
    no gradient flows through the mask.

    On a GPU the host never waits for the device, forward or backward, so it can be captured in a CUDA graph (call it
    once before); only masks that are observed (`record_block_masks`) are lists, for whose length the host waits.

    Raises ValueError where a shape, dtype or thr does not fit. Bit-reproducible, forward and backward (float32 and
    bfloat16 whatever the number of threads), but for the gradients of k and v where the reference serves on a GPU.
    """
    if lists_make_the_host_wait(q.device) and not _observers:
        with stage("NABLA mask"):
            bits = nabla_bits(q, k, layout, thr, sta)
        with stage("block-sparse attention"):
            return bits_attention(q, k, v, *bits, layout)
    with stage("NABLA mask"):
        mask = nabla_mask(q, k, layout, thr, sta)
    for observe in _observers:
        observe(mask)
    with stage("block-sparse attention"):
        return block_sparse_attention(q, *rows_together(k, v), mask)


def lists_make_the_host_wait(device: torch.device) -> bool:
    """Whether work on the device goes on beside the host, which then waits for the length of the lists of a mask."""
    return device.type == "cuda"


def rows_together(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in which the tokens of a head follow each other.

    As views into [B, S, h, D] their blocks, which the C++ kernel reads again and again, fall into few sets of the cache
    and on a page a token; reading them takes twice as long, the copy two passes over them.
    """
    return k.contiguous(), v.contiguous()


@contextmanager
def record_block_masks(observe: Callable[[BlockMask], None]) -> Iterator[None]:
    """Call `observe` with every mask that `nabla_attention` builds inside: to measure density or to draw a mask.

    Not for compiled code, which keeps the observers it was traced with.
    """
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


class Nabla(Engine):
    """`nabla_attention`, or attention over a BlockMask that the caller brings."""

    name = "nabla"
    kind = "sparse"

    def why_not(self, call: Call) -> str | None:
        """It needs a layout, which a BlockMask has too, and takes no mask of tokens."""
        if call.mask is not None and not isinstance(call.mask, BlockMask):
            return f"mask: it takes a BlockMask, got {type(call.mask).__name__}"
        if call.layout is None and call.mask is None:
            return "layout: it needs the TokenLayout of the sequence, got None"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention inside each clip, over the blocks kept."""
        if isinstance(call.mask, BlockMask):
            return block_sparse_attention(q, k, v, call.mask, call.layout)
        assert call.layout is not None  # by why_not
        return nabla_attention(q, k, v, call.layout, call.thr, call.sta)
