"""In what order the forward of block-sparse attention goes through a head, where it is not simply block after block.

Programs start in the order of their numbers: the query blocks of a head one after another, then the next head, so that
one head's keys and values are in the L2 cache at a time. Two things can be asked for on top; neither was measured yet,
so neither is the default.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.triton.attention_tiles import LN_2
from k5kernels.triton.launch import launch

SPLIT_ROWS = 128
COMBINED_TOKENS = 16
# Of the L2 cache, what the keys and values of a range may take.
L2_SHARE = 0.75


@dataclass(frozen=True)
class Schedule:
    """longest_first: query blocks with long lists start first, so that none of them is left running alone at the end.

    key_ranges: all query blocks of a head read the key blocks of the first of so many ranges, then of the second, and
    so on. Each range leaves a partial result in float32; they are added up in the order of the ranges.
    """

    longest_first: bool = False
    key_ranges: int = 1


IN_ORDER = Schedule()


def ranges_in_cache(tokens: int, head_dim: int, element_size: int, l2_bytes: int) -> int:
    """Into how many ranges the keys of a head must be divided so that each fits the L2 cache with its values."""
    return max(1, triton.cdiv(2 * tokens * head_dim * element_size, int(L2_SHARE * l2_bytes)))


def order_of_blocks(offsets: Tensor, batch: int, heads: int) -> Tensor:
    """The query blocks of every head, those with the longest lists first: int32 [B, h, N_b]. Ties: the lower first."""
    order = offsets.diff(dim=-1).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return order.expand(batch, heads, -1).contiguous()


def split_lists(offsets: Tensor, indices: Tensor, ranges: int) -> Tensor:
    """Where the part of each list begins that lies in each range of key blocks: int64 [B_m, H_m, N_b, ranges + 1].

    The last number of a row is where its list ends.
    """
    batch, heads, rows = offsets.shape
    starts = offsets.new_empty(batch, heads, rows - 1, ranges + 1)
    total = batch * heads * (rows - 1)
    launch(
        split_lists_kernel, (triton.cdiv(total, SPLIT_ROWS),),
        offsets.contiguous(), indices, starts, total, rows - 1, RANGES=ranges, ROWS=SPLIT_ROWS, num_warps=4,
    )  # fmt: skip
    return starts


def combine(out: Tensor, lse: Tensor, partial_out: Tensor, partial_lse: Tensor) -> None:
    """Write out [B, h, S, D] and lse [B, h, S] from those of the ranges, float32 [B·h, ranges, S, D] and [.., S]."""
    B, h, S, D = out.shape
    launch(
        combine_kernel, (triton.cdiv(S, COMBINED_TOKENS), B * h), out, lse, partial_out, partial_lse, S,
        RANGES=partial_out.shape[1], D=D, WIDTH=triton.next_power_of_2(D), TOKENS=COMBINED_TOKENS, num_warps=4,
    )  # fmt: skip


@triton.jit
def split_lists_kernel(offsets, indices, starts, total, blocks, RANGES: tl.constexpr, ROWS: tl.constexpr):
    """Lower bounds of the ranges' first key blocks in ROWS ascending lists, by bisection."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    at = offsets + row + row // blocks  # a head has an offset more than rows
    begin = tl.load(at, mask=there, other=0)
    end = tl.load(at + 1, mask=there, other=0)
    target = starts + row * (RANGES + 1)
    for number in range(RANGES + 1):
        first_key = (number * blocks + RANGES - 1) // RANGES
        low = begin
        high = end
        while tl.max(high - low, axis=0) > 0:
            middle = (low + high) // 2
            below = tl.load(indices + middle, mask=there & (low < high), other=0) < first_key
            low = tl.where((low < high) & below, middle + 1, low)
            high = tl.where((low <= middle) & (middle < high), middle, high)
        tl.store(target + number, low, mask=there)


@triton.jit
def combine_kernel(
    out, lse, partial_out, partial_lse, tokens,
    RANGES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head: the ranges' means, weighted by their sums of weights, in order.

    A range of which a row reads nothing has an lse of -inf and a mean of zeros. One whose scores are all -inf has a
    mean of NaN, which is the result where no other range has a score above.
    """
    head_number = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    d = tl.arange(0, WIDTH)
    inside = there[:, None] & (d < D)[None, :]
    sums = partial_lse + head_number * RANGES * tokens + token
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    for number in range(RANGES):
        top = tl.maximum(top, tl.load(sums + number * tokens, mask=there, other=0.0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([TOKENS], tl.float32)
    mean = tl.zeros([TOKENS, WIDTH], tl.float32)
    undefined = tl.zeros([TOKENS, WIDTH], tl.float32)
    for number in range(RANGES):
        part = tl.load(sums + number * tokens, mask=there, other=0.0)
        source = partial_out + ((head_number * RANGES + number) * tokens + token)[:, None] * D + d[None, :]
        values = tl.load(source, mask=inside, other=0.0)
        weight = tl.exp2((part - shift) / LN_2)
        mean += tl.where((part == float("-inf"))[:, None], 0.0, weight[:, None] * values)
        undefined += tl.where((part == float("-inf"))[:, None], values, 0.0)
        total += weight
    nothing = top == float("-inf")
    divisor = tl.broadcast_to(total[:, None], [TOKENS, WIDTH])
    mean = tl.where(nothing[:, None], undefined, tl.div_rn(mean, divisor))
    logarithm = tl.where(nothing, top + tl.sum(undefined, axis=1), shift + tl.log2(total) * LN_2)
    target = out + (head_number * tokens + token)[:, None] * D + d[None, :]
    tl.store(target, mean.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head_number * tokens + token, logarithm, mask=there)
