"""LayerNorm without affine, scaled and shifted by the time embedding: adaLN's first half (§5.3).

    out = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift        over the last dimension

Statistics and modulation are computed in float32 (float64 for float64) whatever the dtype of x.
"""

import torch
from torch import Tensor

from k5kernels.ops.library import register
from k5kernels.ops.modulation import check_modulation, per_token, sum_to_modulation


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize and modulate; the result is contiguous and has the shape and dtype of x.

    x: [B, S, d], any floating dtype. shift, scale: [B, d] (one row a sample) or [B, S, d] (one a token), any
    floating dtype. eps: added to the variance; the default is CrossDiT's.

    Raises ValueError where a shape or dtype does not fit. The result's bits depend on no thread count.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating [B, S, d], got {x.dtype} {list(x.shape)}")
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    return torch.ops.k5.layernorm_modulate(x, shift, scale, eps)


def layernorm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The definition, in plain PyTorch."""
    return (_normalize(x, eps)[0] * (1 + per_token(scale)) + per_token(shift)).to(x.dtype).contiguous()


def layernorm_modulate_backward_reference(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, shift_shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale: of x in x's dtype, of shift and scale in float32 or better."""
    normalized, inverse_deviation = _normalize(x, eps)
    grad = grad.to(normalized.dtype)
    grad_normalized = grad * (1 + per_token(scale))
    projection = normalized * (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_x = (grad_normalized - grad_normalized.mean(-1, keepdim=True) - projection) * inverse_deviation
    return (
        grad_x.to(x.dtype).contiguous(),
        sum_to_modulation(grad, len(shift_shape)),
        sum_to_modulation(grad * normalized, scale.ndim),
    )


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized, _, inverse_deviation = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    return normalized, inverse_deviation


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, shift_shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(shift_shape, dtype=wide),
        x.new_empty(scale.shape, dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, shift, scale, eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.eps, ctx.shift_shape, ctx.shift_dtype = eps, shift.shape, shift.dtype


def _backward(ctx, grad: Tensor):
    x, scale = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = torch.ops.k5.layernorm_modulate_backward(grad, x, scale, ctx.eps, ctx.shift_shape)
    return grad_x, grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None


register(
    "layernorm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
    layernorm_modulate_reference,
    _fake,
    _backward,
    _setup_context,
)
register(
    "layernorm_modulate_backward(Tensor grad, Tensor x, Tensor scale, float eps, SymInt[] shift_shape)"
    " -> (Tensor, Tensor, Tensor)",
    layernorm_modulate_backward_reference,
    _backward_fake,
)
