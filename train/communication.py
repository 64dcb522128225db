"""What share of a training step goes to collectives, read from a trace of the step.

Recording slows the step it records, so `Loop.run` records one before each row of its log. On a CPU the thread that
trains waits for gloo, and all of a collective counts. On a GPU NCCL's kernels run beside others, and only the time in
which nothing else is computed counts: the rest is hidden. Waiting for a slower process is part of a collective.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Span = tuple[int, int]  # begin and end, in ns
# How the names of their events begin: on a CPU both the call and what gloo does beside it.
COLLECTIVES = ("gloo:", "c10d::", "_c10d_functional::", "nccl")
COPIES = ("Memcpy", "Memset")  # of a GPU, which compute nothing


@dataclass
class Share:
    """value: of a step's time, that of collectives; 0 until the step has ended."""

    value: float = 0.0


@contextmanager
def communication_share(device: torch.device) -> Iterator[Share]:
    """Trace the step in the block, which waits for the device at its end. No other profiler may be recording."""
    share, on_gpu = Share(), device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter_ns()
        yield share
        taken = time.perf_counter_ns() - began
    recorded = profiler.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    collectives, others = spans(recorded.kineto_results.events(), on_gpu)
    share.value = min(1.0, exposed_ns(collectives, others) / taken)


def spans(events: Iterable[Any], on_gpu: bool) -> tuple[list[Span], list[Span]]:
    """Of the profiler's events when collectives ran, and when what hides them did: on a CPU nothing does."""
    collectives: list[Span] = []
    others: list[Span] = []
    for event in events:
        if on_gpu == (event.device_type() == DeviceType.CPU):
            continue
        span = event.start_ns(), event.end_ns()
        if event.name().startswith(COLLECTIVES):
            collectives.append(span)
        elif on_gpu and not event.name().startswith(COPIES):
            others.append(span)
    return collectives, others


def exposed_ns(spans: Iterable[Span], others: Iterable[Span]) -> int:
    """How long at least one of the spans lasts while none of the others does."""
    return _union_ns([*spans, *others]) - _union_ns(others)


def _union_ns(spans: Iterable[Span]) -> int:
    total, reached = 0, None
    for begin, end in sorted(spans):
        if reached is None or begin > reached:
            total, reached = total + end - begin, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total
