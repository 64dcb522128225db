"""RMSNorm of every head of q and k, then rotary position embedding (§5.3).

    n = x / sqrt(mean(x²) + eps) * weight                                 over the head dimension
    out[2i]   = n[2i] * cos[i] - n[2i+1] * sin[i]
    out[2i+1] = n[2i] * sin[i] + n[2i+1] * cos[i]

Computed in float32 (float64 for float64) whatever the dtype of q and k, rounded once at the end.
"""

import torch
from torch import Tensor

from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.precision import compute_dtype, in_float32, upcast

EPS = torch.finfo(torch.float32).eps
WIDEST_HEAD = 1024  # of which a program of the GPU kernels holds rows


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Normalize and rotate q and k; the results are contiguous, of the shape and dtype of q.

    q, k: [B, S, h, D] as the projections leave them (views into one fused projection too), one floating dtype,
    D even. q_weight, k_weight: [D], any floating dtype. cos, sin: [S, D/2], float32 (any floating dtype works);
    no gradient flows to them. eps: added to the mean square; the default is that of the released models, whose
    torch.nn.RMSNorm is given none and then takes float32's machine epsilon.

    Raises ValueError where a shape or dtype does not fit. The results have the same bits for any number of threads.
    On a GPU the sums of the weights' gradients are added in an order that follows from the sizes alone.
    Saved for the backward: the arguments themselves, no copies; of q and k together 4 * h * D bytes a token in bf16,
    8 * h * D in float32.
    """
    if q.ndim != 4 or not q.is_floating_point() or q.shape[-1] % 2:
        raise ValueError(f"q: expected a floating [B, S, h, D] with an even D, got {q.dtype} {list(q.shape)}")
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"k: expected {q.dtype} {list(q.shape)} like q, got {k.dtype} {list(k.shape)}")
    S, D = q.shape[1], q.shape[3]
    for name, tensor, shape in (
        ("q_weight", q_weight, (D,)),
        ("k_weight", k_weight, (D,)),
        ("cos", cos, (S, D // 2)),
        ("sin", sin, (S, D // 2)),
    ):
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    return torch.ops.k5.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch."""
    return (
        _rotate(_normalize(q, eps)[0] * q_weight, cos, sin).to(q.dtype).contiguous(),
        _rotate(_normalize(k, eps)[0] * k_weight, cos, sin).to(k.dtype).contiguous(),
    )


def qk_norm_rope_backward_reference(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k (in their dtype) and of the two weights (in float32 or better)."""
    grad_q, grad_q_weight = _backward_of_one(grad_q, q, q_weight, cos, sin, eps)
    grad_k, grad_k_weight = _backward_of_one(grad_k, k, k_weight, cos, sin, eps)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


def _backward_of_one(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normalized, inverse_rms = _normalize(x, eps)
    grad_weighted = _rotate(grad.to(normalized.dtype), cos, -sin)
    grad_normalized = grad_weighted * weight
    projection = normalized * (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_x = (grad_normalized - projection) * inverse_rms
    grad_weight = (grad_weighted * normalized).sum((0, 1, 2))
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(normalized.dtype)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = upcast(x)
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse_rms, inverse_rms


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _fake(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(q, memory_format=dense), torch.empty_like(k, memory_format=dense)


def _backward_fake(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=dense),
        torch.empty_like(k, memory_format=dense),
        q_weight.new_empty(q_weight.shape, dtype=compute_dtype(q)),
        k_weight.new_empty(k_weight.shape, dtype=compute_dtype(q)),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_q: Tensor, grad_k: Tensor):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    grad_q, grad_k, grad_q_weight, grad_k_weight = torch.ops.k5.qk_norm_rope_backward(
        grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, ctx.eps
    )
    return grad_q, grad_k, grad_q_weight.to(q_weight.dtype), grad_k_weight.to(k_weight.dtype), None, None, None


register(
    qk_norm_rope_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES, WIDEST_HEAD, in_float32(tensors=6))},
)
register(
    qk_norm_rope_backward_reference,
    _backward_fake,
    accepts={
        "cpu": Accepts(
            CPU_DTYPES,
            others={
                "gradients in the dtype of q": lambda grad_q, grad_k, q, *rest: grad_q.dtype == grad_k.dtype == q.dtype
            },
        ),
        "cuda": Accepts(GPU_DTYPES, WIDEST_HEAD, in_float32(tensors=8)),
    },
)
