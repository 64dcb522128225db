"""A trace of a few steps of a training, for chrome://tracing or Perfetto: every operator, and the ranges of
`k5kernels.profiling` around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, schedule

from k5kernels.atomic import replacing


@contextmanager
def traced_steps(optimizer: Optimizer, path: Path, steps: int) -> Iterator[None]:
    """The file gets the trace of `steps` of the steps taken inside, after the first; none where steps is 0."""
    if not steps:
        yield
        return

    def save(profiler: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            profiler.export_chrome_trace(str(partial))

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    when = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=save) as profiler:
        hook = optimizer.register_step_post_hook(lambda *arguments: profiler.step())
        try:
            yield
        finally:
            hook.remove()
