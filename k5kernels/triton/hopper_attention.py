"""Attention over a mask of bits by the Gluon kernels for Hopper, which are asked for by name: they ran on no GPU yet.

Ahead of time (`make gpu-report`) they have no spills and no wgmma that ptxas serializes, and the order of their
barriers was run in a model. Until a file of bench/results/ shows them right and faster nothing chooses them.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from k5kernels.triton.bits_attention import parts, places
from k5kernels.triton.block_mask import bits_to_lists
from k5kernels.triton.block_sparse_attention import LOG2_E, describable
from k5kernels.triton.hopper_pair import hopper_pair_kernel
from k5kernels.triton.hopper_single import hopper_single_kernel
from k5kernels.triton.hopper_tiles import BLOCK
from k5kernels.triton.launch import launch
from k5kernels.triton.pair_lists import bits_to_pairs

# By head dimension. Tiles of keys and values in shared memory: 3 CTAs an SM with 64 KiB each, 4 with 40 KiB.
SINGLE = {64: {"KEY_TILES": 2, "VALUE_TILES": 2}, 128: {"KEY_TILES": 1, "VALUE_TILES": 2}}
# Pairs a CTA; the registers of the launch, then those of consumers and producers. All steps of setmaxnreg add up to at
# most maxnreg times the warps, so none waits for ever. Fewer registers spill (C7512: every wgmma is waited for).
PAIR = {
    64: {"PAIRS": 2, "STAGES": 6, "CONSUMER_REGISTERS": 112, "PRODUCER_REGISTERS": 24, "maxnreg": 96},
    128: {"PAIRS": 1, "STAGES": 6, "CONSUMER_REGISTERS": 232, "PRODUCER_REGISTERS": 40, "maxnreg": 168},
}


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    offsets: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    scale: float,
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as in `k5kernels.ops.hopper_attention`. Bit-reproducible; the host does not wait for the device."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    D = q.shape[3]
    q, k, v = (x if describable(x) and x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    arguments: tuple[Any, ...]
    for part, capacity in parts(q, bits, max_clip_blocks):
        B, h, S, _ = q[part].shape
        blocks = S // BLOCK
        own = places(offsets[part]).contiguous()
        tiles = [descriptor(x[part]) for x in (q, k, v, out)]
        sizes = (h, S, blocks, scale * LOG2_E)
        if pairs:
            entries, counts = bits_to_pairs(bits[part], own, capacity)
            grid = (triton.cdiv(blocks, 2 * PAIR[D]["PAIRS"]), B * h)
            arguments = (*tiles, lse[part], own, entries, counts, *sizes)
            launch(hopper_pair_kernel, grid, *arguments, D=D, **PAIR[D], num_warps=4)
        else:
            indices = bits_to_lists(bits[part], own, capacity)
            arguments = (*tiles, lse[part], own, indices, *sizes)
            launch(hopper_single_kernel, (blocks, B * h), *arguments, D=D, **SINGLE[D], num_warps=4)
    return out, lse


def descriptor(x: Tensor) -> TensorDescriptor:
    """Of tiles of 64 tokens of x [B, h, S, D]."""
    block = [1, 1, BLOCK, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, [*x.shape], [*x.stride()], block, layout)
