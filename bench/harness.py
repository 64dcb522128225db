"""Times variants of one computation side by side, and only after each has shown that its output is right.

The variants take turns in one process, so that whatever else the machine does falls on all alike; only the ratio of
their medians is meant to be quoted.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 9
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Row:
    """Median milliseconds of each variant; the first one is ours."""

    name: str
    sizes: str
    threads: int
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        (ours, own_time), *others = self.milliseconds.items()
        ratios = "  ".join(f"{name} {t:.3f} ms ({t / own_time:.2f}x)" for name, t in others)
        return f"{self.name}  {self.sizes}  {self.threads} threads:  {ours} {own_time:.3f} ms  {ratios}"


ROWS: list[Row] = []


def compare(
    benchmark: BenchmarkFixture,
    sizes: str,
    variants: Mapping[str, Callable[[], Any]],
    check: Callable[[Any], None],
) -> Row:
    """Check the output of every variant, time them in turn, keep the row for the summary.

    variants: name -> call without arguments; the first is ours. check: raises where an output is wrong; then nothing
    is timed. The row also goes to pytest-benchmark's JSON.
    """
    for variant in variants.values():
        check(variant())
    calls = {name: _calls_per_round(variant) for name, variant in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            samples[name].append(_seconds(variant, calls[name]) / calls[name])
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in samples.items()}
    row = Row(benchmark.name.removeprefix("test_"), sizes, torch.get_num_threads(), milliseconds)
    ROWS.append(row)
    benchmark.extra_info.update(machine=machine(), sizes=sizes, threads=row.threads, median_ms=milliseconds)
    ours = next(iter(variants))
    benchmark.pedantic(variants[ours], rounds=5, iterations=calls[ours])
    return row


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


def _calls_per_round(variant: Callable[[], Any]) -> int:
    return max(1, round(ROUND_SECONDS / max(_seconds(variant, 1), 1e-6)))


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
