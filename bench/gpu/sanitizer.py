"""Small sizes of the attention and mask kernels under compute-sanitizer, which comes with the CUDA toolkit.

memcheck finds accesses outside of allocations, racecheck unordered accesses to shared memory. PyTorch's cache of memory
is off, so that what memcheck knows of an allocation is its own size.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.gpu.runner import Section

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
FOUND = 9  # the exit code where it found something
LIMIT = 300.0
MISSING = f"not run: {TOOL} is not installed; it comes with the CUDA toolkit, and must be on the PATH"


def sections(command: Callable[[Path], list[str]]) -> list[Section]:
    """A section for each check, of the command that runs the kernels; none where the tool is not installed."""
    tool = shutil.which(TOOL)
    return [] if tool is None else [Section(check, LIMIT, partial(_checked, tool, check, command)) for check in CHECKS]


def _checked(tool: str, check: str, command: Callable[[Path], list[str]], rows: Path) -> list[str]:
    options = ["--tool", check, "--error-exitcode", str(FOUND)]
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, *options, *command(rows)]
