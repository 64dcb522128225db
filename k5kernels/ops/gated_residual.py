"""Residual of a sub-block, gated by the time embedding: adaLN's second half (§5.3).

    out = x + gate * y

Computed in float32 (float64 for float64) whatever the dtypes, rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from k5kernels.ops.library import CPU_DTYPES, Accepts, register
from k5kernels.ops.modulation import (
    check_modulation,
    clip_starts_of,
    map_clips,
    narrow_rows,
    sum_to_modulation,
)
from k5kernels.ops.precision import compute_dtype, upcast
from k5kernels.token_layout import TokenLayout


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, layout: TokenLayout | None = None) -> Tensor:
    """Add the gated y to x; the result is contiguous and has the shape and dtype of x.

    x, y: [B, S, d], any floating dtype each (under autocast y is often narrower than x). gate: any floating dtype, of
    one of these shapes: [B, d], one row a sample; [B, S, d], one row a token; with a layout of S tokens,
    [B * clips, d], one row a clip, the clips of the first sample first ([clips, d] where B = 1; a layout of one clip is
    the same as none).

    Raises ValueError where a shape or dtype does not fit. The result has the same bits for any number of threads.
    On a GPU the sums of the gate's gradient are added in an order that follows from the sizes alone.
    Saved for the backward: y and gate themselves, no copies; 2 * d bytes a token for y in bf16, 4 * d in float32.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating [B, S, d], got {x.dtype} {list(x.shape)}")
    if y.shape != x.shape or not y.is_floating_point():
        raise ValueError(f"y: expected a floating {list(x.shape)} like x, got {y.dtype} {list(y.shape)}")
    clip_starts = clip_starts_of(x, layout)
    check_modulation("gate", gate, x, clip_starts)
    return torch.ops.k5.gated_residual(x, y, gate, clip_starts)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor, clip_starts: Sequence[int]) -> Tensor:
    """The definition, in plain PyTorch; clip_starts: see modulation.py."""

    def add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (x + gate * y).to(x.dtype)

    return map_clips(add, clip_starts, (x, y), (gate,)).contiguous()


def gated_residual_backward_reference(
    grad: Tensor, y: Tensor, gate: Tensor, clip_starts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of y (in y's dtype) and gate (in float32 or better); that of x is `grad` itself."""
    grad = upcast(grad)
    grad_y = map_clips(lambda grad, gate: (gate * grad).to(y.dtype), clip_starts, (grad,), (gate,))
    return grad_y.contiguous(), sum_to_modulation(grad * y, gate.ndim, clip_starts)


def _fake(x: Tensor, y: Tensor, gate: Tensor, clip_starts: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad: Tensor, y: Tensor, gate: Tensor, clip_starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    grad_gate = gate.new_empty(gate.shape, dtype=compute_dtype(grad, y))
    return torch.empty_like(y, memory_format=torch.contiguous_format), grad_gate


def _setup_context(ctx, inputs, output) -> None:
    _, y, gate, ctx.clip_starts = inputs
    ctx.save_for_backward(y, gate)


def _backward(ctx, grad: Tensor):
    y, gate = ctx.saved_tensors
    grad_y, grad_gate = torch.ops.k5.gated_residual_backward(grad, y, gate, ctx.clip_starts)
    return grad, grad_y, grad_gate.to(gate.dtype), None


register(
    gated_residual_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": narrow_rows(tensors=3)},
)
register(
    gated_residual_backward_reference,
    _backward_fake,
    accepts={
        "cpu": Accepts(CPU_DTYPES, others={"y in float32 or bfloat16": lambda grad, y, *rest: y.dtype in CPU_DTYPES}),
        "cuda": narrow_rows(tensors=3),
    },
)
