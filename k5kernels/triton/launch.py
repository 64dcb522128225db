"""How the GPU kernels are launched: through one function, so that a launch can be recorded instead.

The launchers are then the only description of their launches. `python -m bench.gpu_report` runs them on tensors
without memory (device "meta"), records what they would launch on each GPU, and compiles exactly that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its positional arguments, and its constants and options (num_warps, ...) by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class _Recording:
    capability: int
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, or only a record of it inside `record_launches`."""
    recording = _recording.get()
    if recording is None:
        kernel[grid](*arguments, **constants)
    else:
        recording.launches.append(Launch(kernel, grid, arguments, constants))


def generation_of(device: torch.device) -> int:
    """The major compute capability of the GPU that launches are for: 9 for sm_90."""
    recording = _recording.get()
    return recording.capability // 10 if recording else torch.cuda.get_device_capability(device)[0]


@contextmanager
def record_launches(capability: int) -> Iterator[list[Launch]]:
    """Collect the launches made inside, chosen as on a GPU of this compute capability (90 for sm_90), and run none.

    Tensors may be on the device "meta": a launcher reads shapes, strides and dtypes, and no values.
    """
    recording = _Recording(capability)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)
