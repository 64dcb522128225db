"""The committed table of GPU kernels is what the compiler gives, and every gate holds in it."""

import json
from dataclasses import replace

import pytest
import triton

from bench.gpu_report import table
from bench.gpu_report.compile import Work, violations
from bench.gpu_report.roofline import PEAKS, bound_ms

COMBINATIONS = list(table.combinations())
NAMES = [f"{variant.name} D={variant.head_dim} {arch.name}" for variant, arch in COMBINATIONS]


def committed(variant, arch):
    wanted = (variant.name, variant.head_dim, arch.name)
    return next(row for row in table.read() if (row.kernel, row.head_dim, row.arch) == wanted)


def test_the_table_has_one_row_for_each_variant_and_architecture():
    assert len(set(NAMES)) == len(NAMES)
    assert [f"{row.kernel} D={row.head_dim} {row.arch}" for row in table.read()] == NAMES


def test_every_committed_row_passes_the_gate():
    assert table.broken_gates(table.read()) == []


def test_tiles_come_through_tensor_descriptors_only_where_that_lowers_registers():
    registers = {(row.kernel, row.head_dim, row.arch): row.registers for row in table.read()}
    described = [key for key in registers if key[0].endswith(", TMA")]
    assert described
    for kernel, *rest in described:
        assert registers[kernel, *rest] < registers[kernel.removesuffix(", TMA"), *rest], (kernel, *rest)


def test_the_readable_table_is_the_committed_one():
    assert table.READABLE.read_text() == table.readable(table.read())


def test_the_table_was_made_with_the_pinned_triton():
    assert json.loads(table.TABLE.read_text())["triton"] == triton.__version__


# One architecture and head dimension of each kernel in every run, the rest in the slow one.
@pytest.mark.parametrize(
    ("variant", "arch"),
    [
        pytest.param(
            *each, id=name, marks=() if each[0].head_dim == 128 and each[1].capability == 90 else pytest.mark.slow
        )
        for each, name in zip(COMBINATIONS, NAMES, strict=True)
    ],
)
def test_the_compiler_gives_the_committed_row(variant, arch):
    assert table.compile_row(variant, arch) == committed(variant, arch)


def test_the_gate_sees_spills_shared_memory_and_missing_tensor_cores():
    variant, arch = next((v, a) for v, a in COMBINATIONS if v.has_dot and a.capability == 90)
    row = committed(variant, arch)
    assert violations(variant, arch, row) == []
    for change in ({"spills": 1}, {"shared": arch.shared_limit + 1}, {"mma_kind": "HMMA"}, {"mma_kind": "", "mma": 0}):
        assert len(violations(variant, arch, replace(row, **change))) == 1


def test_the_bound_is_the_longer_of_computing_and_moving():
    peak = PEAKS["sm_90a"]
    assert bound_ms(Work(peak.tensor, peak.memory / 2), peak) == 1000
    assert bound_ms(Work(peak.tensor / 2, peak.memory), peak) == 1000
    assert bound_ms(Work(peak.vector, 1, tensor_core=False), peak) == 1000
