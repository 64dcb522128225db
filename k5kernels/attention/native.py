"""Exact attention on a CPU by this library's C++ kernel: the block-sparse one, which is told to read every block."""

import math

import torch
from torch import Tensor

from k5kernels.attention.engine import Call, DenseEngine
from k5kernels.ops.block_sparse_attention import ACCEPTS
from k5kernels.ops.library import kernel_for
from k5kernels.tensor_cache import cached_tensors

BLOCK = 64  # tokens: a whole block of the kernel
HAS_KERNEL = kernel_for("block_sparse_attention", "cpu") == "C++"


class Native(DenseEngine):
    """Self-attention of clips. Dense attention asks nothing of the tokens' order: its blocks are runs of 64."""

    name = "native"

    def why_not(self, call: Call) -> str | None:
        """Device, kernel, dtype, mask and layout, asked in this order."""
        if call.device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {call.device.type}"
        if not HAS_KERNEL:
            return "this library was installed without a C++ compiler"
        if call.dtype not in ACCEPTS["cpu"].dtypes:
            return f"it takes float32 and bfloat16, the tensors are {str(call.dtype).removeprefix('torch.')}"
        if call.mask is not None:
            return f"mask: it takes none, got {type(call.mask).__name__}"
        if call.layout is None:
            return "layout: it needs the TokenLayout of the sequence, got None"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention inside each clip, in the dtype of the call."""
        return super().run(q.to(call.dtype), k.to(call.dtype), v.to(call.dtype), call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Of q to all of k and v."""
        lists = _every_block(q.shape[2])
        return torch.ops.k5.block_sparse_attention(
            q, k.contiguous(), v.contiguous(), *lists, BLOCK, 1 / math.sqrt(q.shape[-1])
        )[0]


@cached_tensors(maxsize=16)
def _every_block(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets and indices as in a `BlockMask`, one list for all samples and heads, and the first token of each block.

    The indices take four bytes a pair of blocks: 9 MB at 94k tokens.
    """
    blocks = (tokens + BLOCK - 1) // BLOCK
    starts = (BLOCK * torch.arange(blocks + 1)).clamp(max=tokens)
    offsets = blocks * torch.arange(blocks + 1)
    return offsets[None, None], torch.arange(blocks, dtype=torch.int32).repeat(blocks), starts
