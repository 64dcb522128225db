"""Fixtures all tests share: the devices and the CPU instruction sets that this machine has."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from k5kernels.ops import library

# Few examples, the same ones every time; the fixtures below are safe to keep from one example to the next.
settings.register_profile(
    "k5",
    deadline=None,
    max_examples=20,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("k5")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ISAS = {"portable": 0, "avx2": 1, "avx512_bf16": 2}

TRITON_TESTS = Path(__file__).parent / "triton_kernels"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Triton's interpreter and its compiler cannot share a process.

    `TRITON_INTERPRET=1 pytest` runs tests/triton_kernels and nothing else, plain `pytest` everything but that.
    """
    belongs_to_interpreter = TRITON_TESTS in collection_path.parents
    if collection_path.is_file() and belongs_to_interpreter != INTERPRETED:
        return True
    return None


def _available_isas() -> list[str]:
    """Instruction sets of the C++ kernels; "reference" alone where none were built."""
    if not library.NATIVE.exists():
        return ["reference"]
    best = torch.ops.k5_cpu.isa()
    return [name for name, number in ISAS.items() if number <= best]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def force_isa() -> Iterator[Callable[[int], bool]]:
    """`torch.ops.k5_cpu.force_isa`, undone after the test."""
    before = torch.ops.k5_cpu.isa()
    yield torch.ops.k5_cpu.force_isa
    torch.ops.k5_cpu.force_isa(before)


@pytest.fixture(params=_available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Run the test once with each instruction set the C++ kernels were built for and this processor has."""
    if request.param != "reference":
        assert request.getfixturevalue("force_isa")(ISAS[request.param])
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
