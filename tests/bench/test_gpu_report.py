"""The committed table of GPU kernels is what the compiler gives, and every gate holds in it."""

import ast
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from bench.gpu.gather_kernel import gather_tiles
from bench.gpu_report import table
from bench.gpu_report.compile import ARCHS, compile_launch, violations
from bench.gpu_report.launches import variants
from bench.gpu_report.roofline import PEAKS, SIZES, Work, bound_ms
from k5kernels.triton.attention_configurations import Configuration
from k5kernels.triton.launch import record_launches

COMBINATIONS = list(table.combinations())
NAMES = [f"{variant.name} D={variant.head_dim} {arch.name}" for variant, arch in COMBINATIONS]


LARGEST = max(SIZES)  # head dimension


def first_launches(capability, of):
    """The first launch of each kernel, or of each file of kernels, at the largest head dimension."""
    found = {}
    for (variant, arch), name in zip(COMBINATIONS, NAMES, strict=True):
        if variant.head_dim == LARGEST and arch.capability == capability:
            found.setdefault(of(variant.launch.kernel), name)
    return set(found.values())


def the_kernel(kernel):
    return kernel


def its_file(kernel):
    return kernel.fn.__module__


def all_launches(capability):
    """Every launch at the largest head dimension."""
    return {
        name
        for (variant, arch), name in zip(COMBINATIONS, NAMES, strict=True)
        if variant.head_dim == LARGEST and arch.capability == capability
    }


IN_EVERY_RUN = first_launches(90, its_file)
ONE_OF_EACH = [first_launches(arch.capability, the_kernel) for arch in ARCHS]
IN_THE_SLOW_ONE = all_launches(90).union(*ONE_OF_EACH) - IN_EVERY_RUN


def committed(variant, arch):
    wanted = (variant.name, variant.head_dim, arch.name)
    return next(row for row in table.read() if (row.kernel, row.head_dim, row.arch) == wanted)


def kernels_written():
    """The functions of k5kernels/triton whose name ends with "_kernel"."""
    files = sorted((Path(table.__file__).parents[2] / "k5kernels" / "triton").glob("*.py"))
    modules = [importlib.import_module(f"k5kernels.triton.{path.stem}") for path in files]
    return {
        getattr(module, name).fn.__qualname__: getattr(module, name)
        for module in modules
        for name in vars(module)
        if name.endswith("_kernel")
    }


def test_every_kernel_is_launched_in_the_report():
    launched = {variant.launch.kernel for variant, _ in COMBINATIONS}
    written = kernels_written()
    assert len(written) > 10
    assert {name for name, kernel in written.items() if kernel not in launched} == set()


def test_kernels_are_launched_through_the_function_that_can_record_them_alone():
    for path in sorted((Path(table.__file__).parents[2] / "k5kernels" / "triton").glob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        subscripted = [ast.unparse(function) for function in calls if isinstance(function, ast.Subscript)]
        assert subscripted == (["kernel[grid]"] if path.stem == "launch" else []), path


def test_launches_of_one_name_that_differ_are_not_taken_for_one(monkeypatch):
    monkeypatch.setattr(
        "k5kernels.triton.block_sparse_attention.configuration", lambda *_: Configuration(next(warps), 2, False)
    )
    warps = iter(range(1, 1000))
    with pytest.raises(ValueError, match="attention: forward"):
        variants(SIZES[64], 80)


def test_the_table_has_one_row_for_each_variant_and_architecture():
    assert len(set(NAMES)) == len(NAMES)
    assert [f"{row.kernel} D={row.head_dim} {row.arch}" for row in table.read()] == NAMES


def test_every_committed_row_passes_the_gate():
    assert table.broken_gates(table.read()) == []


def test_the_readable_table_is_the_committed_one():
    assert table.READABLE.read_text() == table.readable(table.read())


def test_the_table_was_made_with_the_pinned_triton():
    assert json.loads(table.TABLE.read_text())["triton"] == triton.__version__


@pytest.mark.parametrize(
    ("variant", "arch"),
    [
        pytest.param(*each, id=name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow)
        for each, name in zip(COMBINATIONS, NAMES, strict=True)
        if name in IN_EVERY_RUN | IN_THE_SLOW_ONE
    ],
)
def test_the_compiler_gives_the_committed_row(variant, arch):
    """In every run one launch of each file of kernels on sm_90a, at the largest head dimension; in the slow one the
    others there and one of each kernel on the other architectures. `make gpu-report` compares all rows, which takes 20
    minutes."""
    assert table.compile_row(variant, arch) == committed(variant, arch)


def test_the_gate_sees_spills_shared_memory_missing_tensor_cores_and_products_that_wait_for_each_other():
    variant, arch = next((v, a) for v, a in COMBINATIONS if v.has_dot and a.capability == 90)
    row = committed(variant, arch)
    assert violations(variant, arch, row) == []
    for change in (
        {"spills": 1},
        {"shared": arch.shared_limit + 1},
        {"mma_kind": "HMMA"},
        {"mma_kind": "", "mma": 0},
        {"serialized": 1},
    ):
        assert len(violations(variant, arch, replace(row, **change))) == 1


def test_the_bound_is_the_longer_of_computing_and_moving():
    peak = PEAKS["sm_90a"]
    assert bound_ms(Work(peak.tensor, peak.memory / 2, tensor_core=True), peak) == 1000
    assert bound_ms(Work(peak.tensor / 2, peak.memory, tensor_core=True), peak) == 1000
    assert bound_ms(Work(peak.vector, 1), peak) == 1000


def test_of_kernels_with_wgmma_the_report_says_what_the_loop_is_made_of():
    rows = {(row.kernel, row.head_dim): row for row in table.read() if row.arch == "sm_90a"}
    for dim in SIZES:
        plain, single, pairs = (
            rows[name, dim].loop
            for name in (
                "attention: forward bf16, TMA",
                "attention on Hopper: forward bf16",
                "attention on Hopper: forward bf16, pairs",
            )
        )
        assert "34 EX2 (0 under HGMMA)" in plain
        assert "34 EX2 (34 under HGMMA)" in single
        assert "34 EX2 (34 under HGMMA)" in pairs


@pytest.mark.parametrize("dim", SIZES)
def test_the_gather_probe_compiles(dim):
    size = SIZES[dim]
    k, v = (torch.empty(1, 2, size.tokens, dim, dtype=torch.bfloat16, device="meta") for _ in range(2))
    starts = torch.empty(1, 2, size.blocks, dtype=torch.int64, device="meta")
    entries = torch.empty(100, dtype=torch.int32, device="meta")
    with record_launches(90) as launches:
        gather_tiles(k, v, starts, starts, entries)
    (launch,) = launches
    used = compile_launch(launch, next(arch for arch in ARCHS if arch.capability == 90))
    assert (used.spills, used.tma) == (0, 2 * dim // 64)  # a tile of 64 columns at a time
