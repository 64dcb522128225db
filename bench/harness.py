"""Checks the outputs of several variants of one computation, then times them in turn.

The variants take turns in one process, so that other load on the machine slows all of them alike. Quote their ratios,
not their times.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from train.resident import SETS_ALLOCATOR

ROUNDS = 9
ROUND_SECONDS = 0.02
LONG_SECONDS = 1.0  # of a call
COPY = "copy"


@dataclass(frozen=True)
class Row:
    """Milliseconds of a call in every round, by variant; the first one is ours.

    operations: floating-point operations of a call, by variant, where variants do not compute equally much.
    bytes_moved: bytes that a call must read from memory and write to it. The variant COPY moves as many, so ours is as
    many times as fast as it as the share of the bandwidth of a copy that ours reaches.
    """

    name: str
    sizes: str
    threads: int
    milliseconds: dict[str, list[float]]
    operations: dict[str, float] | None = None
    bytes_moved: int | None = None

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.milliseconds.items()}

    def rounds(self) -> int:
        return len(next(iter(self.milliseconds.values())))

    def ratios(self, variant: str) -> tuple[float, float, float]:
        """How many times ours is as fast as the variant (for each operation, where they are given): the lower
        quartile, the median and the upper quartile over the rounds."""
        ours = next(iter(self.milliseconds))
        work = self.operations[ours] / self.operations[variant] if self.operations else 1.0
        pairs = zip(self.milliseconds[variant], self.milliseconds[ours], strict=True)
        ratios = [work * other / own for other, own in pairs]
        if len(ratios) == 1:  # of calls that take minutes
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high

    def __str__(self) -> str:
        medians = self.medians()
        parts = []
        for number, (name, median) in enumerate(medians.items()):
            part = f"{name} {median:.3f} ms"
            if self.operations:
                part += f" {self.operations[name] / median / 1e6:.0f} GFLOP/s"
            if self.bytes_moved and name in (next(iter(medians)), COPY):
                part += f" {self.bytes_moved / median / 1e6:.1f} GB/s"
            if number:
                low, middle, high = self.ratios(name)
                part += f" ({middle:.2f}x, {low:.2f} to {high:.2f})"
            parts.append(part)
        moved = f"  {self.bytes_moved / 1e6:.0f} MB moved" if self.bytes_moved else ""
        timed = f"{self.threads} threads, {self.rounds()} rounds"
        return f"{self.name}  {self.sizes}{moved}  {timed}:  {'  '.join(parts)}"


ROWS: list[Row] = []


@dataclass(frozen=True)
class Trust:
    """A prediction (claim), what it was compared with (case), its relative error, and the largest error allowed."""

    claim: str
    case: str
    error: float
    floor: float | None = None

    def __str__(self) -> str:
        kept = "" if self.floor is None else f"  (at most {self.floor:.0%})"
        return f"{self.claim:18} {self.case:70} {self.error:+7.1%}{kept}"


TRUST: list[Trust] = []


def measure(
    name: str,
    sizes: str,
    variants: Mapping[str, Callable[[], Any]],
    check: Callable[[Any], None],
    operations: dict[str, float] | None = None,
    rounds: int = ROUNDS,
    bytes_moved: int | None = None,
) -> Row:
    """Check the output of every variant, then time them in turn.

    variants: name -> call without arguments; the first is ours. check: raises where an output is wrong; then nothing
    is timed. operations: as in Row. bytes_moved: as in Row; with it a copy is timed too.

    Where every variant takes longer than a second, the checked calls are the first round.
    """
    checked = {label: _checked(call, check) for label, call in variants.items()}
    if bytes_moved is None and min(checked.values()) > LONG_SECONDS:
        calls, samples = dict.fromkeys(variants, 1), {label: [1e3 * seconds] for label, seconds in checked.items()}
    else:
        variants = variants if bytes_moved is None else {**variants, COPY: copy_of(bytes_moved)}
        calls, samples = {label: _calls_per_round(call) for label, call in variants.items()}, {}
    while len(samples.get(next(iter(variants)), [])) < rounds:
        for label, call in variants.items():
            samples.setdefault(label, []).append(1e3 * _seconds(call, calls[label]) / calls[label])
    return Row(name, sizes, torch.get_num_threads(), samples, operations, bytes_moved)


def compare(
    benchmark: BenchmarkFixture,
    sizes: str,
    variants: Mapping[str, Callable[[], Any]],
    check: Callable[[Any], None],
    operations: dict[str, float] | None = None,
    floors: Mapping[str, float] | None = None,
    bytes_moved: int | None = None,
    rounds: int = ROUNDS,
) -> Row:
    """`measure`, with the row kept for the summary and for pytest-benchmark's JSON.

    floors: variant -> how many times as fast as it ours must be at least, at the median; raises AssertionError where
    ours is not, with the row kept all the same.
    """
    name = benchmark.name.removeprefix("test_")
    row = measure(name, sizes, variants, check, operations, rounds, bytes_moved)
    benchmark.extra_info.update(machine=machine(), sizes=sizes, threads=row.threads, median_ms=row.medians())
    ours = next(iter(variants))
    # For pytest-benchmark's own table; calls that take seconds have been timed often enough.
    seconds = row.medians()[ours] / 1e3
    benchmark.pedantic(variants[ours], rounds=5 if seconds < LONG_SECONDS else 1, iterations=_calls(seconds))
    return keep(row, floors)


def keep(row: Row, floors: Mapping[str, float] | None = None) -> Row:
    """Add the row to the summary; `compare` without pytest-benchmark, for calls that take minutes.

    floors: as in `compare`.
    """
    ROWS.append(row)
    for variant, floor in (floors or {}).items():
        median = row.ratios(variant)[1]
        assert median >= floor, f"{row.name}: {median:.2f}x {variant}, below the floor of {floor:g}x"
    return row


def copy_of(bytes_moved: int) -> Callable[[], Tensor]:
    """PyTorch's copy, on all threads, that reads half of these bytes and writes the other half."""
    source = torch.ones(bytes_moved // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sum_tolerance(dtype: torch.dtype, terms: int) -> float:
    """How far a sum of so many terms may be off, relative to the largest of its kind: compiled code adds them one after
    the other, and rounding errors then grow with the root of their number."""
    return torch.finfo(dtype).eps * math.sqrt(terms)


def in_float64(arguments: Iterable[Any]) -> list[Any]:
    """The arguments with every tensor in float64."""
    return [value.double() if isinstance(value, Tensor) else value for value in arguments]


def memory_in_words() -> str:
    return "outputs reuse memory (mallopt)" if SETS_ALLOCATOR else "outputs take fresh memory"


def machine() -> str:
    """Processor, versions and load, for the head of a table."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{model}, {os.cpu_count()} cores{device}; Python {platform.python_version()}, torch {torch.__version__}; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def _checked(variant: Callable[[], Any], check: Callable[[Any], None]) -> float:
    """The seconds of a call; raises where check does not take what it returned."""
    outputs: list[Any] = []
    seconds = _seconds(lambda: outputs.append(variant()), 1)
    check(*outputs)
    return seconds


def _calls_per_round(variant: Callable[[], Any]) -> int:
    return _calls(_seconds(variant, 1))


def _calls(seconds: float) -> int:
    return max(1, round(ROUND_SECONDS / max(seconds, 1e-6)))


def _seconds(variant: Callable[[], Any], calls: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        variant()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
