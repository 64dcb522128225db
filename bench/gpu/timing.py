"""Times variants of one computation in turn, on the GPU or (to test the sections) on the CPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

ROUNDS = 7
ROUND_MS = 15.0
MOST_CALLS = 50


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of a call in every round, by variant. Each has been called before (compiled, and checked).

    The variants take turns. What they read does not fit in the L2 cache at the sizes that are measured, so it is not
    flushed between calls.
    """
    calls = {}
    for name, variant in variants.items():
        variant()
        calls[name] = max(1, min(MOST_CALLS, int(ROUND_MS / max(elapsed(variant, 1), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(elapsed(variant, calls[name]))
    return times


def elapsed(call: Callable[[], Any], calls: int) -> float:
    """Milliseconds of one of several calls."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper
