"""How the tokens of a batch are shared among programs: runs of tokens of one clip, whole rows of d values in registers.

A run reads one row of a modulation, once. Where a gradient of such a row is wanted, each run writes its part of the
sum, and `sum_of_runs` adds the parts in their order: two calls give the same bits. How tokens are cut into runs depends
on the sizes alone, so every card cuts them in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.tensor_cache import cached_tensors
from k5kernels.triton.launch import launch

WARPS = 8
MOST_WARPS = 16
VALUES_OF_A_THREAD = 16
# Tiles in flight: one that is computed and those loaded meanwhile, into shared memory. Three tensors of this many
# float32 values in two tiles fit in the shared memory of every card; of larger tiles one is loaded ahead.
STAGES, STAGED_VALUES = 3, 4096
RUNS = 1024  # of a batch in a backward: enough for every multiprocessor, few enough that their parts cost little
LEAST_RUN = 8  # tokens: the parts of the sums then take no more memory than a gradient in bfloat16
SUMMED_RUNS, SUMMED_COLUMNS = 256, 32  # by one program, in one step


@dataclass(frozen=True)
class Runs:
    """Runs of `length` tokens of each clip of B samples; the last one of a clip may be shorter.

    of_sample: runs of one sample. clip_table: int32 [2, clips + 1] on the device, the first token and the first run of
    each clip of a sample, then S and `of_sample`; None for one clip.
    """

    samples: int
    tokens: int
    clips: int
    length: int
    of_sample: int
    clip_table: Tensor | None

    @property
    def number(self) -> int:
        return self.samples * self.of_sample

    @property
    def arguments(self) -> tuple[Tensor | None, int, int, int, int]:
        """What a kernel gives to `run_of_program`, but for CLIPS."""
        return self.clip_table, self.clips, self.tokens, self.length, self.of_sample

    @property
    def padded_clips(self) -> int:
        """The constant CLIPS of the kernels."""
        return triton.next_power_of_2(self.clips)


def runs_of(x: Tensor, clip_starts: Sequence[int], length: int) -> Runs:
    """x: [B, S, d]. length: of a run, in tokens."""
    counts = (triton.cdiv(end - start, length) for start, end in pairwise(clip_starts))
    first_runs = tuple(accumulate(counts, initial=0))
    clips = len(first_runs) - 1
    table = None if clips == 1 else _table((tuple(clip_starts), first_runs), x.device)
    return Runs(x.shape[0], x.shape[1], clips, length, first_runs[-1], table)


def backward_runs(x: Tensor, clip_starts: Sequence[int], rows: int) -> Runs:
    """About RUNS runs, of whole tiles of `rows` tokens."""
    length = max(LEAST_RUN, triton.cdiv(x.shape[0] * x.shape[1], RUNS))
    return runs_of(x, clip_starts, triton.cdiv(length, rows) * rows)


def tile(width: int, values: int) -> dict[str, int]:
    """Constants of a kernel whose programs hold about `values` values at a time, in whole rows of `width`."""
    padded = triton.next_power_of_2(width)
    rows = max(1, values // padded)
    warps = max(1, min(MOST_WARPS, rows * padded // (32 * VALUES_OF_A_THREAD)))
    return {
        "WIDTH": padded,
        "ROWS": rows,
        "STAGES": STAGES if rows * padded <= STAGED_VALUES else 2,
        "num_warps": max(warps, min(WARPS, padded // 256)),
    }


def as_rows(modulation: Tensor, clips: int) -> Tensor:
    """[B, clips, d] of a modulation with a row a sample or a clip, [B, S, d] of one with a row a token."""
    modulation = unit_stride(modulation)
    return modulation if modulation.ndim == 3 else modulation.unflatten(0, (-1, clips))


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy where the values of a row are not neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def sum_of_runs(parts: Tensor, runs: Runs, *totals: Tensor) -> None:
    """Write the sums over the runs of each clip of each sample to one or two totals, float32 [B * clips, d] each.

    parts: float32 [totals, runs, d].
    """
    planes, _, d = parts.shape
    grid = (triton.cdiv(d, SUMMED_COLUMNS), runs.samples * runs.clips, planes)
    launch(
        sum_runs_kernel, grid, parts, totals[0], totals[-1], d, *runs.arguments, runs.number,
        ROWS=SUMMED_RUNS, COLUMNS=SUMMED_COLUMNS, num_warps=WARPS,
    )  # fmt: skip


# Computed on the device alone: copying a Python list to a GPU would synchronize with it.
@cached_tensors(maxsize=256)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    numbers = [torch.full((1,), number, dtype=torch.int32, device=device) for row in rows for number in row]
    return torch.cat(numbers).view(len(rows), -1)


@triton.jit
def run_of_program(clip_table, clips, tokens, length, of_sample, CLIPS: tl.constexpr):
    """The sample and the clip of this program's run, its first token, and its end."""
    program = tl.program_id(0)
    run = program % of_sample
    if CLIPS == 1:
        clip = 0
        first = run * length
        end = tokens
    else:
        number = tl.arange(0, CLIPS)
        next_run = tl.load(clip_table + clips + 2 + number, mask=number < clips, other=of_sample)
        clip = tl.sum((next_run <= run).to(tl.int32), axis=0)
        first = tl.load(clip_table + clip) + (run - tl.load(clip_table + clips + 1 + clip)) * length
        end = tl.load(clip_table + clip + 1)
    return (program // of_sample).to(tl.int64), clip, first, tl.minimum(end, first + length)


@triton.jit
def load_row(rows, sample, row, stride_b, stride_r, column, d):
    """Row `row` of a sample, float32 [WIDTH]; zeros from column d on."""
    address = rows + sample * stride_b + tl.cast(row, tl.int64) * stride_r
    return tl.load(address + column, mask=column < d, other=0.0).to(tl.float32)


@triton.jit
def load_tokens(x, sample, token, stride_b, stride_s, column, inside):
    """The rows of some tokens of a sample, float32 [ROWS, WIDTH]; zeros where not inside."""
    address = x + sample * stride_b + token.to(tl.int64)[:, None] * stride_s + column[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(target, values, sample, token, tokens, d, column, inside):
    """Rounded to the dtype of a contiguous target [B, S, d]."""
    address = target + (sample * tokens + token.to(tl.int64))[:, None] * d + column[None, :]
    tl.store(address, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def store_part(parts, plane, runs, values, d, column):
    """The sum over the rows [ROWS, WIDTH] of this program's run."""
    address = parts + (plane * runs + tl.program_id(0)).to(tl.int64) * d + column
    tl.store(address, tl.sum(values, axis=0), mask=column < d)


@triton.jit
def sum_runs_kernel(
    parts, first_total, second_total, d, clip_table, clips, tokens, length, of_sample, runs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over the runs of one clip of one sample, of some columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    plane = tl.program_id(2)
    first = row // clips * of_sample
    end = first + of_sample
    if clip_table is not None:
        own = clip_table + clips + 1 + row % clips
        end = first + tl.load(own + 1)
        first += tl.load(own)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        run = start + tl.arange(0, ROWS)
        inside = (run < end)[:, None] & (column < d)[None, :]
        address = parts + (plane * runs + run).to(tl.int64)[:, None] * d + column[None, :]
        total += tl.load(address, mask=inside, other=0.0)
    target = row.to(tl.int64) * d + column
    if plane == 0:
        tl.store(first_total + target, tl.sum(total, axis=0), mask=column < d)
    else:
        tl.store(second_total + target, tl.sum(total, axis=0), mask=column < d)
