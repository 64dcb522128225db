"""Set-up of the benchmarks, and their table at the end of the run."""

import pytest
import torch

from bench import harness
from train.resident import reuse_memory

reuse_memory(True)  # faulting in fresh pages takes longer than the kernels that fill them


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if harness.TRUST:
        terminalreporter.section("trust: predicted / measured − 1")
        terminalreporter.write_line(harness.machine())
        for claim in harness.TRUST:
            terminalreporter.write_line(str(claim))
    if not harness.ROWS:
        return
    terminalreporter.section("medians; in brackets how many times ours is as fast: median and quartiles of the rounds")
    terminalreporter.write_line(f"{harness.machine()}; rounds interleaved; {harness.memory_in_words()}")
    for row in harness.ROWS:
        terminalreporter.write_line(str(row))
