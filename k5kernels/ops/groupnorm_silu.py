"""GroupNorm, then SiLU: what stands before every convolution of the VAE (§7.1).

    n = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias    over one group's channels and all positions
    out = n * sigmoid(n)

Computed in float32 (float64 for float64) whatever the dtype of x, rounded once at the end.

It reads x twice: groupnorm_statistics.py, then groupnorm_silu_apply.py. Those two serve where x comes in chunks.
"""

import math

import torch
from torch import Tensor

from k5kernels.memory_format import memory_format_like
from k5kernels.ops.groupnorm_silu_apply import EPS, check_affine
from k5kernels.ops.groupnorm_statistics import check_groups
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.precision import GRAD_LIKE_X, compute_dtype


def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = EPS) -> Tensor:
    """Normalize and activate; the result has the shape and dtype of x.

    It is dense in `torch.channels_last` or `torch.channels_last_3d` where x [B, C, (T,) H, W] has channels
    innermost, else contiguous.

    x: [B, C, ...], any floating dtype. weight, bias: [C], any floating dtype. groups: divides C. eps: added to
    the variance; the default is that of the released HunyuanVideo VAE.

    Raises ValueError where a shape or dtype does not fit. The C++ kernels, forward and backward, give the same bits for
    any number of threads; PyTorch's GroupNorm, which the references call, only for one and the same number.
    Saved for the backward: x itself, no copy; 2 * C bytes a position in bf16, 4 * C in float32.
    """
    check_groups(x, groups)
    check_affine(x, weight, bias)
    return torch.ops.k5.groupnorm_silu(x, weight, bias, groups, eps)


def groupnorm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """The definition, in plain PyTorch."""
    if x.numel() == 0:  # PyTorch's kernel for CUDA refuses zero channels
        return torch.empty_like(x, memory_format=memory_format_like(x))
    dtype = compute_dtype(x)
    normalized = torch.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    return torch.nn.functional.silu(normalized).to(x.dtype).contiguous(memory_format=memory_format_like(x))


def groupnorm_silu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in x's dtype), weight and bias (in float32 or better).

    The forward saves x alone; statistics and normalized x are computed from it again. To save the normalized x would
    keep a second activation, in float32.
    """
    dtype, target = compute_dtype(x), memory_format_like(x)
    # PyTorch's GroupNorm kernels take channels-last tensors on the CPU only.
    native = target if x.is_cpu else torch.contiguous_format
    upcast_x, upcast_grad = (t.to(dtype).contiguous(memory_format=native) for t in (x, grad))
    weight, bias = weight.to(dtype), bias.to(dtype)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=target), torch.zeros_like(weight), torch.zeros_like(bias)
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    normalized, mean, inverse_deviation = torch.ops.aten.native_group_norm(upcast_x, weight, bias, *sizes, eps)
    grad_normalized = torch.ops.aten.silu_backward(upcast_grad, normalized).contiguous(memory_format=native)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_normalized, upcast_x, mean, inverse_deviation, weight, *sizes, [True, True, True]
    )
    return grad_x.to(x.dtype).contiguous(memory_format=target), grad_weight, grad_bias


def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format_like(x))


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=memory_format_like(x)),
        x.new_empty(weight.shape, dtype=compute_dtype(x)),
        x.new_empty(bias.shape, dtype=compute_dtype(x)),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad: Tensor):
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.k5.groupnorm_silu_backward(grad, x, weight, bias, ctx.groups, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


register(
    groupnorm_silu_reference,
    _fake,
    _backward,
    _setup_context,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES)},
)
register(
    groupnorm_silu_backward_reference,
    _backward_fake,
    accepts={"cpu": Accepts(CPU_DTYPES, others=GRAD_LIKE_X), "cuda": Accepts(GPU_DTYPES)},
)
