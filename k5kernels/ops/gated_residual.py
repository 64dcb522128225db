"""Residual of a sub-block, gated by the time embedding: adaLN's second half (§5.3).

    out = x + gate * y

Computed in float32 (float64 for float64) whatever the dtypes, rounded once.
"""

import torch
from torch import Tensor

from k5kernels.ops.library import register
from k5kernels.ops.modulation import check_modulation, per_token, sum_to_modulation


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Add the gated y to x; the result is contiguous and has the shape and dtype of x.

    x, y: [B, S, d], any floating dtype each (under autocast y is often narrower than x). gate: [B, d] (one row a
    sample) or [B, S, d] (one a token), any floating dtype.

    Raises ValueError where a shape or dtype does not fit. The result's bits depend on no thread count.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating [B, S, d], got {x.dtype} {list(x.shape)}")
    if y.shape != x.shape or not y.is_floating_point():
        raise ValueError(f"y: expected a floating {list(x.shape)} like x, got {y.dtype} {list(y.shape)}")
    check_modulation("gate", gate, x)
    return torch.ops.k5.gated_residual(x, y, gate)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The definition, in plain PyTorch."""
    return (x + per_token(gate) * y).to(x.dtype).contiguous()


def gated_residual_backward_reference(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y (in y's dtype) and gate (in float32 or better); that of x is `grad` itself."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return (per_token(gate) * grad).to(y.dtype).contiguous(), sum_to_modulation(grad * y, gate.ndim)


def _fake(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(grad.dtype, y.dtype), torch.float32)
    return torch.empty_like(y, memory_format=torch.contiguous_format), gate.new_empty(gate.shape, dtype=wide)


def _setup_context(ctx, inputs, output) -> None:
    _, y, gate = inputs
    ctx.save_for_backward(y, gate)


def _backward(ctx, grad: Tensor):
    y, gate = ctx.saved_tensors
    grad_y, grad_gate = torch.ops.k5.gated_residual_backward(grad, y, gate)
    return grad, grad_y, grad_gate.to(gate.dtype)


register(
    "gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor",
    gated_residual_reference,
    _fake,
    _backward,
    _setup_context,
)
register(
    "gated_residual_backward(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    gated_residual_backward_reference,
    _backward_fake,
)
