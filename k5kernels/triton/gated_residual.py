"""The gated residual on the GPU, forward and backward: every tensor of tokens is read once or written once."""

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

VALUES = 4096  # of each tensor, held by a program at a time
FORWARD_TILES = 8  # of a run: its row of the gate is read once for so many


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, clip_starts: Sequence[int]) -> Tensor:
    """x + gate * y, as in `k5kernels.ops.gated_residual`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    constants = tile(x.shape[2], VALUES)
    runs = runs_of(x, clip_starts, FORWARD_TILES * constants["ROWS"])
    x, y, rows = unit_stride(x), unit_stride(y), as_rows(gate, runs.clips)
    launch(
        gated_residual_kernel, (runs.number,),
        x, y, rows, out, x.shape[2], *x.stride()[:2], *y.stride()[:2], *rows.stride()[:2], *runs.arguments,
        CLIPS=runs.padded_clips, PER_TOKEN=gate.ndim == 3, **constants,
    )  # fmt: skip
    return out


def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor, clip_starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the gate, this one in float32."""
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad_gate = torch.empty(gate.shape, dtype=torch.float32, device=y.device)
    if y.numel() == 0:
        return grad_y, grad_gate.zero_()
    d, per_token = y.shape[2], gate.ndim == 3
    constants = tile(d, VALUES)
    runs = backward_runs(y, clip_starts, constants["ROWS"])
    # A gate a token has a gradient a token, which the kernel writes at once.
    parts = grad_gate if per_token else grad_gate.new_empty(1, runs.number, d)
    grad, y, rows = unit_stride(grad), unit_stride(y), as_rows(gate, runs.clips)
    launch(
        gated_residual_backward_kernel, (runs.number,),
        grad, y, rows, grad_y, parts, d, *grad.stride()[:2], *y.stride()[:2], *rows.stride()[:2], *runs.arguments,
        runs.number, CLIPS=runs.padded_clips, PER_TOKEN=per_token, **constants,
    )  # fmt: skip
    if not per_token:
        sum_of_runs(parts, runs, grad_gate)
    return grad_y, grad_gate


@triton.jit
def gated_residual_kernel(
    x, y, gate, out, d, x_stride_b, x_stride_s, y_stride_b, y_stride_s, gate_stride_b, gate_stride_r,
    clip_table, clips, tokens, length, of_sample,
    CLIPS: tl.constexpr, PER_TOKEN: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A run of tokens, ROWS at a time."""
    sample, clip, start, end = run_of_program(clip_table, clips, tokens, length, of_sample, CLIPS)
    column = tl.arange(0, WIDTH)
    if not PER_TOKEN:
        factor = load_row(gate, sample, clip, gate_stride_b, gate_stride_r, column, d)[None, :]
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        inside = (token < end)[:, None] & (column < d)[None, :]
        if PER_TOKEN:
            factor = load_tokens(gate, sample, token, gate_stride_b, gate_stride_r, column, inside)
        residual = load_tokens(x, sample, token, x_stride_b, x_stride_s, column, inside)
        values = load_tokens(y, sample, token, y_stride_b, y_stride_s, column, inside)
        store_tokens(out, residual + factor * values, sample, token, tokens, d, column, inside)


@triton.jit
def gated_residual_backward_kernel(
    grad, y, gate, grad_y, grad_gate, d,
    g_stride_b, g_stride_s, y_stride_b, y_stride_s, gate_stride_b, gate_stride_r,
    clip_table, clips, tokens, length, of_sample, runs,
    CLIPS: tl.constexpr, PER_TOKEN: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A run of tokens, ROWS at a time. grad_gate: of each token, or of each run where a gate serves several tokens."""
    sample, clip, start, end = run_of_program(clip_table, clips, tokens, length, of_sample, CLIPS)
    column = tl.arange(0, WIDTH)
    if not PER_TOKEN:
        factor = load_row(gate, sample, clip, gate_stride_b, gate_stride_r, column, d)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        token = first + tl.arange(0, ROWS)
        inside = (token < end)[:, None] & (column < d)[None, :]
        if PER_TOKEN:
            factor = load_tokens(gate, sample, token, gate_stride_b, gate_stride_r, column, inside)
        grads = load_tokens(grad, sample, token, g_stride_b, g_stride_s, column, inside)
        values = load_tokens(y, sample, token, y_stride_b, y_stride_s, column, inside)
        store_tokens(grad_y, factor * grads, sample, token, tokens, d, column, inside)
        if PER_TOKEN:
            store_tokens(grad_gate, grads * values, sample, token, tokens, d, column, inside)
        else:
            total += grads * values
    if not PER_TOKEN:
        store_part(grad_gate, 0, runs, total, d, column)
