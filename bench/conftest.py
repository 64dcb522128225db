"""Set-up of the benchmarks, and their table at the end of the run."""

import ctypes
import sys

import pytest
import torch

from bench import harness

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
REUSES_MEMORY = sys.platform == "linux"

# Large outputs would otherwise be unmapped and mapped again at every call, and page faults outweigh the kernels.
if REUSES_MEMORY:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not harness.ROWS:
        return
    terminalreporter.section("medians, and their ratio to ours")
    memory = "outputs reuse memory (mallopt)" if REUSES_MEMORY else "outputs take fresh memory"
    terminalreporter.write_line(f"{harness.machine()}; {harness.ROUNDS} interleaved rounds; {memory}")
    for row in harness.ROWS:
        terminalreporter.write_line(str(row))
