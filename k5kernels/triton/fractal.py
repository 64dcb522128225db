"""Fractal order on the GPU: whole tokens are gathered as integers, whatever their dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.token_layout import TokenLayout
from k5kernels.triton.launch import launch

COPIED_BYTES = 1 << 14  # by one program, at most
WARPS = 8
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fractal_flatten(x: Tensor, block_side: int) -> Tensor:
    """[B, T, H, W, ...] to [B, T·H·W, ...], as in `k5kernels.ops.fractal`."""
    T, H, W = x.shape[1:4]
    return _gather(x.flatten(1, 3), TokenLayout(((T, H, W),), block_side).permutation(x.device))


def fractal_unflatten(x: Tensor, frames: int, height: int, width: int, block_side: int) -> Tensor:
    """The inverse of `fractal_flatten`."""
    order = TokenLayout(((frames, height, width),), block_side).inverse_permutation(x.device)
    return _gather(x, order).unflatten(1, (frames, height, width))


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order], contiguous; x: [B, S, ...]."""
    B, S = x.shape[:2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    integer = INTEGERS[x.element_size()]
    source = x.reshape(B, S, -1).view(integer)
    source = source if source.stride(-1) == 1 else source.contiguous()
    length = source.shape[-1]
    rows, columns = copied_tile(length, x.element_size())
    grid = (triton.cdiv(S, rows), B, triton.cdiv(length, columns))
    launch(
        gather_rows_kernel, grid,
        source, order, out.view(integer), *source.stride()[:2], S, length, ROWS=rows, COLUMNS=columns, num_warps=WARPS,
    )  # fmt: skip
    return out


def copied_tile(length: int, element_size: int) -> tuple[int, int]:
    """(rows, elements of a row) that one program copies."""
    columns = min(triton.next_power_of_2(length), COPIED_BYTES // element_size)
    return COPIED_BYTES // (columns * element_size), columns


@triton.jit
def gather_rows_kernel(
    source, order, target, stride_b, stride_s, tokens, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Copies row order[i] of the source to row i of the target."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < tokens
    token = tl.load(order + row, mask=there, other=0)
    inside = there[:, None] & (column < length)[None, :]
    values = tl.load(source + batch * stride_b + token[:, None] * stride_s + column[None, :], mask=inside)
    place = (batch * tokens + row.to(tl.int64)) * length
    tl.store(target + place[:, None] + column[None, :], values, mask=inside)
