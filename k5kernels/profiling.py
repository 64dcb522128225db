"""Names for the stages of a step, which Nsight Systems shows as NVTX ranges and torch.profiler as annotations."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec

import torch
from torch.autograd.profiler import record_function

HAS_NVTX = find_spec("nvtx") is not None


def stage(name: str) -> AbstractContextManager:
    """A range of this name around what runs inside: for torch.profiler while it records, and for NVTX where the
    package nvtx is installed. Ranges nest. In a compiled graph there is none, as the graph has no such boundary."""
    if torch.compiler.is_compiling():
        return nullcontext()
    ranges = ExitStack()
    if HAS_NVTX:
        import nvtx

        ranges.enter_context(nvtx.annotate(name, domain="k5kernels"))
    ranges.enter_context(record_function(name))
    return ranges
