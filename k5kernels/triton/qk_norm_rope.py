"""RMSNorm and rotary embedding of q and k on the GPU: one launch reads both once and writes both once.

What is normalized is a head of a token, here called a row; a program holds several, of q and of k, so that both use the
cosines and sines it loads. Of the weights' gradients each program of the backward writes its part, and the parts are
added in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.triton.launch import launch
from k5kernels.triton.token_runs import LEAST_RUN, RUNS, Runs, store_part, sum_of_runs, unit_stride

FORWARD_VALUES, BACKWARD_VALUES = 4096, 2048  # of q and as many of k, held by a program at a time
STAGES = 3  # tiles in flight in the backward
WARPS = 8


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As in `k5kernels.ops.qk_norm_rope`."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.numel() == 0:
        return q_out, k_out
    _, S, h, D = q.shape
    total, constants = q.numel() // D, _tile(D, FORWARD_VALUES)
    q, k, cos, sin = (unit_stride(x) for x in (q, k, cos, sin))
    launch(
        norm_rope_kernel, (triton.cdiv(total, constants["ROWS"]),),
        q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_out, k_out, total, S, h, eps,
        *q.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0), D=D, **constants,
    )  # fmt: skip
    return q_out, k_out


def qk_norm_rope_backward(
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
    """Gradients of q, k and of the two weights, these in float32."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    of_q_weight, of_k_weight = (x.new_empty(x.shape, dtype=torch.float32) for x in (q_weight, k_weight))
    if q.numel() == 0:
        return q_out, k_out, of_q_weight.zero_(), of_k_weight.zero_()
    _, S, h, D = q.shape
    total, constants = q.numel() // D, _tile(D, BACKWARD_VALUES)
    length = triton.cdiv(max(LEAST_RUN, triton.cdiv(total, RUNS)), constants["ROWS"]) * constants["ROWS"]
    runs = Runs(1, total, 1, length, triton.cdiv(total, length), None)
    parts = of_q_weight.new_empty(2, runs.number, D)
    grad_q, grad_k, q, k, cos, sin = (unit_stride(x) for x in (grad_q, grad_k, q, k, cos, sin))
    launch(
        norm_rope_backward_kernel, (runs.number,),
        grad_q, grad_k, q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_out, k_out, parts,
        total, S, h, eps, length, runs.number, *grad_q.stride()[:3], *grad_k.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], cos.stride(0), sin.stride(0), D=D, STAGES=STAGES, **constants,
    )  # fmt: skip
    sum_of_runs(parts, runs, of_q_weight, of_k_weight)
    return q_out, k_out, of_q_weight, of_k_weight


def _tile(D: int, values: int) -> dict[str, int]:
    """Constants of a kernel whose programs hold about `values` values of q at a time."""
    width = max(2, triton.next_power_of_2(D))
    return {"WIDTH": width, "ROWS": max(1, values // width), "num_warps": WARPS}


@triton.jit
def split_pairs(values, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] to what stands in even and in odd places, [ROWS, WIDTH / 2] each."""
    return tl.split(tl.reshape(values, [ROWS, WIDTH // 2, 2]))


@triton.jit
def load_pairs(x, row, tokens, heads, stride_b, stride_s, stride_h, column, inside, ROWS: tl.constexpr,
               WIDTH: tl.constexpr):  # fmt: skip
    """Some rows of x [B, S, h, D] in float32, `split_pairs`; zeros where not inside."""
    sample = (row // (tokens * heads)).to(tl.int64)
    token = (row // heads % tokens).to(tl.int64)
    address = x + sample * stride_b + token * stride_s + (row % heads).to(tl.int64) * stride_h
    values = tl.load(address[:, None] + column[None, :], mask=inside, other=0.0)
    return split_pairs(values.to(tl.float32), ROWS, WIDTH)


@triton.jit
def store_pairs(out, even, odd, row, column, inside, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_pairs`, to a contiguous tensor, rounded to its dtype."""
    values = tl.reshape(tl.join(even, odd), [ROWS, WIDTH]).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], values, mask=inside)


@triton.jit
def load_weight(weight, column, D: tl.constexpr, WIDTH: tl.constexpr):
    """A weight in float32, `split_pairs`: [1, WIDTH / 2] each."""
    values = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    return split_pairs(values[None, :], 1, WIDTH)


@triton.jit
def load_angles(table, row, tokens, heads, stride, total, D: tl.constexpr, WIDTH: tl.constexpr):
    """Cosines or sines [S, D / 2] of the tokens of some rows, float32 [ROWS, WIDTH / 2]."""
    pair = tl.arange(0, WIDTH // 2)
    address = table + (row // heads % tokens).to(tl.int64)[:, None] * stride + pair[None, :]
    inside = (row < total)[:, None] & (pair < D // 2)[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(even, odd, eps, D: tl.constexpr):
    """One over the root of the mean square, [ROWS, 1]."""
    return (1 / tl.sqrt(tl.sum(even * even + odd * odd, axis=1) / D + eps))[:, None]


@triton.jit
def norm_rope(even, odd, even_weight, odd_weight, cos, sin, eps, D: tl.constexpr):
    inverse = inverse_rms(even, odd, eps, D)
    even = even * inverse * even_weight
    odd = odd * inverse * odd_weight
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def norm_rope_gradient(grad_even, grad_odd, even, odd, even_weight, odd_weight, cos, sin, eps, D: tl.constexpr):
    """Gradients of the pairs, and of the weights from each row."""
    inverse = inverse_rms(even, odd, eps, D)
    even = even * inverse
    odd = odd * inverse
    turned_even = grad_even * cos + grad_odd * sin
    turned_odd = grad_odd * cos - grad_even * sin
    of_even = turned_even * even_weight
    of_odd = turned_odd * odd_weight
    share = (tl.sum(of_even * even + of_odd * odd, axis=1) / D)[:, None]
    return (of_even - even * share) * inverse, (of_odd - odd * share) * inverse, turned_even * even, turned_odd * odd


@triton.jit
def norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, total, tokens, heads, eps,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, cos_stride, sin_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of q and of k."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < total)[:, None] & (column < D)[None, :]
    q_even, q_odd = load_pairs(q, row, tokens, heads, q_stride_b, q_stride_s, q_stride_h, column, inside, ROWS, WIDTH)
    k_even, k_odd = load_pairs(k, row, tokens, heads, k_stride_b, k_stride_s, k_stride_h, column, inside, ROWS, WIDTH)
    cosines = load_angles(cos, row, tokens, heads, cos_stride, total, D, WIDTH)
    sines = load_angles(sin, row, tokens, heads, sin_stride, total, D, WIDTH)
    even_weight, odd_weight = load_weight(q_weight, column, D, WIDTH)
    q_even, q_odd = norm_rope(q_even, q_odd, even_weight, odd_weight, cosines, sines, eps, D)
    store_pairs(q_out, q_even, q_odd, row, column, inside, D, ROWS, WIDTH)
    even_weight, odd_weight = load_weight(k_weight, column, D, WIDTH)
    k_even, k_odd = norm_rope(k_even, k_odd, even_weight, odd_weight, cosines, sines, eps, D)
    store_pairs(k_out, k_even, k_odd, row, column, inside, D, ROWS, WIDTH)


@triton.jit
def norm_rope_backward_kernel(
    grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, q_out, k_out, parts, total, tokens, heads, eps, length, runs,
    gq_stride_b, gq_stride_s, gq_stride_h, gk_stride_b, gk_stride_s, gk_stride_h,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, cos_stride, sin_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of rows of q and of k, ROWS at a time. parts: sums over the run of the gradients of the two weights."""
    start = tl.program_id(0) * length
    end = tl.minimum(total, start + length)
    column = tl.arange(0, WIDTH)
    q_even_weight, q_odd_weight = load_weight(q_weight, column, D, WIDTH)
    k_even_weight, k_odd_weight = load_weight(k_weight, column, D, WIDTH)
    q_even_total = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    q_odd_total = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    k_even_total = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    k_odd_total = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < D)[None, :]
        cosines = load_angles(cos, row, tokens, heads, cos_stride, total, D, WIDTH)
        sines = load_angles(sin, row, tokens, heads, sin_stride, total, D, WIDTH)
        grad_even, grad_odd = load_pairs(
            grad_q, row, tokens, heads, gq_stride_b, gq_stride_s, gq_stride_h, column, inside, ROWS, WIDTH
        )
        even, odd = load_pairs(q, row, tokens, heads, q_stride_b, q_stride_s, q_stride_h, column, inside, ROWS, WIDTH)
        even, odd, of_even_weight, of_odd_weight = norm_rope_gradient(
            grad_even, grad_odd, even, odd, q_even_weight, q_odd_weight, cosines, sines, eps, D
        )
        q_even_total += of_even_weight
        q_odd_total += of_odd_weight
        store_pairs(q_out, even, odd, row, column, inside, D, ROWS, WIDTH)
        grad_even, grad_odd = load_pairs(
            grad_k, row, tokens, heads, gk_stride_b, gk_stride_s, gk_stride_h, column, inside, ROWS, WIDTH
        )
        even, odd = load_pairs(k, row, tokens, heads, k_stride_b, k_stride_s, k_stride_h, column, inside, ROWS, WIDTH)
        even, odd, of_even_weight, of_odd_weight = norm_rope_gradient(
            grad_even, grad_odd, even, odd, k_even_weight, k_odd_weight, cosines, sines, eps, D
        )
        k_even_total += of_even_weight
        k_odd_total += of_odd_weight
        store_pairs(k_out, even, odd, row, column, inside, D, ROWS, WIDTH)
    q_total = tl.reshape(tl.join(q_even_total, q_odd_total), [ROWS, WIDTH])
    k_total = tl.reshape(tl.join(k_even_total, k_odd_total), [ROWS, WIDTH])
    store_part(parts, 0, runs, q_total, D, column)
    store_part(parts, 1, runs, k_total, D, column)
