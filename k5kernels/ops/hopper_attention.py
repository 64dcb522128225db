"""Attention over a mask of bits by kernels that are written for Hopper GPUs, and refused anywhere else.

Nothing chooses them. They have run on no GPU yet, and a kernel whose warps wait for each other hangs where it is wrong:
they serve who calls `hopper_attention`, or registers `k5kernels.attention.NablaHopper`. `python -m bench.gpu`
runs them in processes with a time limit.
"""

import math
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from k5kernels.ops.bits_attention import bits_attention_reference
from k5kernels.ops.block_sparse_attention import checked_tokens
from k5kernels.ops.library import HAS_TRITON, Accepts, register
from k5kernels.token_layout import TokenLayout

HEAD_DIMS = (64, 128)
BLOCK_TOKENS = 64
HOPPER = (9, 0)
OLDEST_TRITON = (3, 6)  # of those the kernels compile with
GLUON = "triton.experimental.gluon.language.nvidia.hopper"


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    offsets: Tensor,
    layout: TokenLayout,
    scale: float | None = None,
    pairs: bool = True,
) -> Tensor:
    """Attention over the blocks whose bits are set: [B, h, S, D] bfloat16.

    q, k, v: bfloat16 [B, h, S, D], D 64 or 128, on a GPU of compute capability 9.0; every block of the layout has 64
    tokens. bits, offsets: of `nabla_bits`. scale: positive, 1/sqrt(D) where None. pairs: two neighbouring query blocks
    share the key blocks they read; else each reads its own. Differentiable once in q, k and v, by the kernels of
    `bits_attention`. Scores must be finite. Bit-reproducible.

    Raises ValueError where the kernels cannot run here, or an argument is not what they take.
    """
    q, k, v = checked_tokens(q, k, v, layout)
    if reason := why_not(q.device, q.dtype, q.shape[-1], layout):
        raise ValueError(f"hopper_attention: {reason}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    sizes = (layout.max_block_tokens, layout.max_clip_blocks, scale, pairs)
    return torch.ops.k5.hopper_attention(q, k, v, bits, offsets, layout.block_starts(q.device), *sizes)[0]


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, layout: TokenLayout) -> str | None:
    """Why the kernels cannot run such a call, in words; None where they can."""
    if device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) != HOPPER:
        return f"it is for GPUs of compute capability {HOPPER}, this one has {torch.cuda.get_device_capability(device)}"
    if not has_gluon():
        return f"it needs triton {'.'.join(map(str, OLDEST_TRITON))} or newer, with Gluon for Hopper"
    if dtype != torch.bfloat16:
        return f"it takes bfloat16, the tensors are {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, the tensors have {head_dim}"
    if layout.max_block_tokens != BLOCK_TOKENS or layout.tokens != layout.blocks * BLOCK_TOKENS:
        return f"layout: it takes blocks of {BLOCK_TOKENS} tokens each, some of {layout} have fewer or more"
    return None


@cache
def has_gluon() -> bool:
    """Whether this installation can compile the kernels."""
    if not HAS_TRITON:
        return False
    try:
        major, minor = version("triton").split(".")[:2]
        return (int(major), int(minor)) >= OLDEST_TRITON and find_spec(GLUON) is not None
    except (PackageNotFoundError, ModuleNotFoundError):  # built from source; or without the experimental parts
        return False


def hopper_attention_reference(
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
    """The definition, in plain PyTorch: that of `bits_attention`, whichever kernel computes it."""
    return bits_attention_reference(q, k, v, bits, offsets, block_starts, max_block_tokens, max_clip_blocks, scale)


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
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.max_block_tokens, ctx.max_clip_blocks, ctx.scale, _ = inputs
    q, k, v, bits, offsets, block_starts = tensors
    ctx.save_for_backward(q, k, v, *output, bits, offsets, block_starts)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives each saved tensor only once
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    sizes = (ctx.max_block_tokens, ctx.max_clip_blocks, ctx.scale)
    grads = torch.ops.k5.bits_attention_backward(grad_out, grad_lse, *saved, *sizes)
    return *grads, None, None, None, None, None, None, None


# What `why_not` accepts arrives here; head dims, blocks and the GPU were looked at there.
register(
    hopper_attention_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cuda": Accepts((torch.bfloat16,), largest_head_dim=HEAD_DIMS[-1])},
)
