"""Small sizes of every kernel under compute-sanitizer, which comes with the CUDA toolkit.

memcheck finds accesses outside of allocations, racecheck unordered accesses to shared memory. PyTorch's cache of memory
is off, so that what memcheck knows of an allocation is its own size.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bench.gpu.runner import Section

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
FOUND = 9  # the exit code where it found something
LIMIT = 300.0
MISSING = f"not run: {TOOL} is not installed; it comes with the CUDA toolkit, and must be on the PATH"


def sections(commands: Mapping[str, Callable[[Path], list[str]]]) -> list[Section]:
    """A section for each check of each command, which runs kernels; none where the tool is not installed.

    commands: by the words that follow the name of the check in that of the section.
    """
    tool = shutil.which(TOOL)
    if tool is None:
        return []
    return [
        Section(f"{check}{words}", LIMIT, partial(_checked, tool, check, command))
        for words, command in commands.items()
        for check in CHECKS
    ]


def _checked(tool: str, check: str, command: Callable[[Path], list[str]], rows: Path) -> list[str]:
    options = ["--tool", check, "--error-exitcode", str(FOUND)]
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, *options, *command(rows)]
