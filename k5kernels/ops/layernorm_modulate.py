"""LayerNorm without affine, scaled and shifted by the time embedding: adaLN's first half (§5.3).

    out = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift        over the last dimension

Statistics and modulation are computed in float32 (float64 for float64) whatever the dtype of x.
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
from k5kernels.ops.precision import GRAD_LIKE_X, compute_dtype, upcast
from k5kernels.token_layout import TokenLayout

EPS = 1e-5


def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS, layout: TokenLayout | None = None
) -> Tensor:
    """Normalize and modulate; the result is contiguous and has the shape and dtype of x.

    x: [B, S, d], any floating dtype. shift, scale: any floating dtype, each of one of these shapes:
    [B, d], one row a sample; [B, S, d], one row a token; with a layout of S tokens, [B * clips, d], one row a clip,
    the clips of the first sample first ([clips, d] where B = 1; a layout of one clip is the same as none).
    eps: added to the variance; the default is that of the released models, whose torch.nn.LayerNorm is given none.

    Raises ValueError where a shape or dtype does not fit. The result has the same bits for any number of threads.
    On a GPU the sums of the gradients of shift and scale are added in an order that follows from the sizes alone.
    Saved for the backward: x and scale themselves, no copies; 2 * d bytes a token for x in bf16, 4 * d in float32.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating [B, S, d], got {x.dtype} {list(x.shape)}")
    clip_starts = clip_starts_of(x, layout)
    check_modulation("shift", shift, x, clip_starts)
    check_modulation("scale", scale, x, clip_starts)
    return torch.ops.k5.layernorm_modulate(x, shift, scale, eps, clip_starts)


def layernorm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, clip_starts: Sequence[int]
) -> Tensor:
    """The definition, in plain PyTorch; clip_starts: see modulation.py."""

    def modulate(normalized: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (normalized * (1 + scale) + shift).to(x.dtype)

    return map_clips(modulate, clip_starts, (_normalize(x, eps)[0],), (shift, scale)).contiguous()


def layernorm_modulate_backward_reference(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, shift_shape: Sequence[int], clip_starts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale: of x in x's dtype, of shift and scale in float32 or better."""
    normalized, inverse_deviation = _normalize(x, eps)
    grad = grad.to(normalized.dtype)
    grad_normalized = map_clips(lambda grad, scale: grad * (1 + scale), clip_starts, (grad,), (scale,))
    projection = normalized * (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_x = (grad_normalized - grad_normalized.mean(-1, keepdim=True) - projection) * inverse_deviation
    return (
        grad_x.to(x.dtype).contiguous(),
        sum_to_modulation(grad, len(shift_shape), clip_starts),
        sum_to_modulation(grad * normalized, scale.ndim, clip_starts),
    )


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalized, _, inverse_deviation = torch.native_layer_norm(upcast(x), x.shape[-1:], None, None, eps)
    return normalized, inverse_deviation


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, clip_starts: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, shift_shape: Sequence[int], clip_starts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(shift_shape, dtype=compute_dtype(x)),
        x.new_empty(scale.shape, dtype=compute_dtype(x)),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, shift, scale, ctx.eps, ctx.clip_starts = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift_shape, ctx.shift_dtype = shift.shape, shift.dtype


def _backward(ctx, grad: Tensor):
    x, scale = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = torch.ops.k5.layernorm_modulate_backward(
        grad, x, scale, ctx.eps, ctx.shift_shape, ctx.clip_starts
    )
    return grad_x, grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None, None


register(
    layernorm_modulate_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": narrow_rows(tensors=3)},
)
register(
    layernorm_modulate_backward_reference,
    _backward_fake,
    accepts={"cpu": Accepts(CPU_DTYPES, others=GRAD_LIKE_X), "cuda": narrow_rows(tensors=3)},
)
