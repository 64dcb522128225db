"""How the kernels of block-sparse attention load and store tiles of tokens of one head."""

import math

import triton
import triton.language as tl

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_rows(
    source, stride_s, first, end, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr
):
    """ROWS tokens of one head from `first` on: [ROWS, WIDTH]; zeros from token `end` and from column D on."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    address = source + first.to(tl.int64) * stride_s + row[:, None] * stride_s + d[None, :]
    if FULL and D == WIDTH:
        rows = tl.load(address)
    else:
        rows = tl.load(address, mask=(first + row < end)[:, None] & (d < D)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(
    target, values, first, end, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr
):
    """The inverse of `load_rows`, to a contiguous [S, D]; nothing is stored from `end` or D on."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    address = target + first.to(tl.int64) * D + row[:, None] * D + d[None, :]
    if FULL and D == WIDTH:
        tl.store(address, values)
    else:
        tl.store(address, values, mask=(first + row < end)[:, None] & (d < D)[None, :])


@triton.jit
def load_tile(
    source, stride_s, sample, head, first, end,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of the loop over a list. source: a tensor descriptor, or the address of the first token of the head."""
    if TMA:
        tile = source.load([sample, head, first, 0]).reshape(TILE, WIDTH)
    else:
        tile = load_rows(source, stride_s, first, end, D, WIDTH, TILE, FULL)
    return tile


@triton.jit
def token_range(block_starts, block, tile, TILE: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr):
    """The first token of a tile of a block, and the end of the block."""
    if FULL:
        first = block * (TILE * TILES) + tile * TILE
        end = (block + 1) * (TILE * TILES)
    else:
        first = tl.load(block_starts + block).to(tl.int32) + tile * TILE
        end = tl.load(block_starts + block + 1).to(tl.int32)
    return first, end
