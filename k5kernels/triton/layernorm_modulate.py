"""LayerNorm with modulation on the GPU, forward and backward: every tensor of tokens is read once or written once.

A program holds whole rows, so the backward computes their statistics again from the x that it reads anyway.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.triton.launch import launch
from k5kernels.triton.token_runs import (
    as_rows,
    backward_runs,
    load_row,
    load_tokens,
    run_of_program,
    runs_of,
    store_part,
    store_tokens,
    sum_of_runs,
    tile,
    unit_stride,
)

FORWARD_VALUES, BACKWARD_VALUES = 4096, 2048  # of each tensor, held by a program at a time
FORWARD_TILES = 8  # of a run: its rows of shift and scale are read once for so many


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, clip_starts: Sequence[int]) -> Tensor:
    """As in `k5kernels.ops.layernorm_modulate`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    constants = tile(x.shape[2], FORWARD_VALUES)
    runs = runs_of(x, clip_starts, FORWARD_TILES * constants["ROWS"])
    x, shifts, scales = unit_stride(x), as_rows(shift, runs.clips), as_rows(scale, runs.clips)
    launch(
        modulate_kernel, (runs.number,),
        x, shifts, scales, out, x.shape[2], eps,
        *x.stride()[:2], *shifts.stride()[:2], *scales.stride()[:2], *runs.arguments, CLIPS=runs.padded_clips,
        SHIFT_PER_TOKEN=shift.ndim == 3, SCALE_PER_TOKEN=scale.ndim == 3, **constants,
    )  # fmt: skip
    return out


def layernorm_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, shift_shape: Sequence[int], clip_starts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, these two in float32."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_shift, grad_scale = (x.new_empty(shape, dtype=torch.float32) for shape in (shift_shape, scale.shape))
    if x.numel() == 0:
        return grad_x, grad_shift.zero_(), grad_scale.zero_()
    d = x.shape[2]
    constants = tile(d, BACKWARD_VALUES)
    runs = backward_runs(x, clip_starts, constants["ROWS"])
    # A row a token has a gradient a token, which the kernel writes at once; rows of clips have parts, one a run.
    of_clips = [total for total in (grad_shift, grad_scale) if total.ndim == 2]
    parts = grad_shift.new_empty(len(of_clips), runs.number, d) if of_clips else None
    grad, x, scales = unit_stride(grad), unit_stride(x), as_rows(scale, runs.clips)
    launch(
        modulate_backward_kernel, (runs.number,),
        grad, x, scales, grad_x, grad_shift, grad_scale, parts, d, eps,
        *grad.stride()[:2], *x.stride()[:2], *scales.stride()[:2], *runs.arguments, runs.number,
        CLIPS=runs.padded_clips, SHIFT_PER_TOKEN=grad_shift.ndim == 3, SCALE_PER_TOKEN=grad_scale.ndim == 3,
        **constants,
    )  # fmt: skip
    if parts is not None:
        sum_of_runs(parts, runs, *of_clips)
    return grad_x, grad_shift, grad_scale


@triton.jit
def normalize(rows, inside, d, eps):
    """Rows less their mean, over their deviation, zeros where not inside; and one over the deviation, [ROWS, 1]."""
    mean = tl.sum(rows, axis=1) / d
    centred = tl.where(inside, rows - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / d + eps)
    return centred * inverse[:, None], inverse[:, None]


@triton.jit
def modulate_kernel(
    x, shift, scale, out, d, eps,
    x_stride_b, x_stride_s, shift_stride_b, shift_stride_r, scale_stride_b, scale_stride_r,
    clip_table, clips, tokens, length, of_sample,
    CLIPS: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A run of tokens, ROWS at a time."""
    sample, clip, start, end = run_of_program(clip_table, clips, tokens, length, of_sample, CLIPS)
    column = tl.arange(0, WIDTH)
    if not SHIFT_PER_TOKEN:
        shifts = load_row(shift, sample, clip, shift_stride_b, shift_stride_r, column, d)[None, :]
    if not SCALE_PER_TOKEN:
        scales = load_row(scale, sample, clip, scale_stride_b, scale_stride_r, column, d)[None, :]
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        inside = (token < end)[:, None] & (column < d)[None, :]
        if SHIFT_PER_TOKEN:
            shifts = load_tokens(shift, sample, token, shift_stride_b, shift_stride_r, column, inside)
        if SCALE_PER_TOKEN:
            scales = load_tokens(scale, sample, token, scale_stride_b, scale_stride_r, column, inside)
        rows = load_tokens(x, sample, token, x_stride_b, x_stride_s, column, inside)
        normalized, _ = normalize(rows, inside, d, eps)
        store_tokens(out, normalized * (1 + scales) + shifts, sample, token, tokens, d, column, inside)


@triton.jit
def modulate_backward_kernel(
    grad, x, scale, grad_x, grad_shift, grad_scale, parts, d, eps,
    g_stride_b, g_stride_s, x_stride_b, x_stride_s, scale_stride_b, scale_stride_r,
    clip_table, clips, tokens, length, of_sample, runs,
    CLIPS: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A run of tokens, ROWS at a time. parts: sums over the run, of the shift's gradient and then of the scale's, of
    those that have no row a token."""
    sample, clip, start, end = run_of_program(clip_table, clips, tokens, length, of_sample, CLIPS)
    column = tl.arange(0, WIDTH)
    if not SCALE_PER_TOKEN:
        scales = load_row(scale, sample, clip, scale_stride_b, scale_stride_r, column, d)[None, :]
        scale_total = tl.zeros([ROWS, WIDTH], tl.float32)
    if not SHIFT_PER_TOKEN:
        shift_total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        inside = (token < end)[:, None] & (column < d)[None, :]
        if SCALE_PER_TOKEN:
            scales = load_tokens(scale, sample, token, scale_stride_b, scale_stride_r, column, inside)
        grads = load_tokens(grad, sample, token, g_stride_b, g_stride_s, column, inside)
        rows = load_tokens(x, sample, token, x_stride_b, x_stride_s, column, inside)
        normalized, inverse = normalize(rows, inside, d, eps)
        of_scale = grads * normalized
        of_normalized = grads * (1 + scales)
        mean = tl.sum(of_normalized, axis=1) / d
        share = tl.sum(of_normalized * normalized, axis=1) / d
        values = (of_normalized - mean[:, None] - normalized * share[:, None]) * inverse
        store_tokens(grad_x, values, sample, token, tokens, d, column, inside)
        if SHIFT_PER_TOKEN:
            store_tokens(grad_shift, grads, sample, token, tokens, d, column, inside)
        else:
            shift_total += grads
        if SCALE_PER_TOKEN:
            store_tokens(grad_scale, of_scale, sample, token, tokens, d, column, inside)
        else:
            scale_total += of_scale
    if not SHIFT_PER_TOKEN:
        store_part(parts, 0, runs, shift_total, d, column)
    if not SCALE_PER_TOKEN:
        store_part(parts, 0 if SHIFT_PER_TOKEN else 1, runs, scale_total, d, column)
