"""What `k5 info` tells of this machine."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from k5kernels import info
from k5kernels.cli import app
from k5kernels.ops import library


def test_every_operator_is_listed_with_its_kernel_on_both_devices():
    listed = {(operator.name, operator.device): operator.kernel for operator in info.machine().operators}
    assert listed == {
        (name, device): library.kernel_for(name, device) for name in library.OPERATORS for device in ("cpu", "cuda")
    }


def test_the_instruction_set_is_the_one_in_use(isa):
    cpu = info.machine().cpu
    assert cpu.instruction_set == (None if isa == "reference" else isa)
    assert cpu.threads == torch.get_num_threads()


def test_a_native_kernel_says_for_which_dtypes_and_with_which_instructions(isa):
    if isa == "reference":
        pytest.skip("installed without a C++ compiler")
    reasons = {(o.name, o.device): o.reason for o in info.machine().operators}
    for name in ("block_sparse_attention", "layernorm_modulate"):
        assert "float32 and bfloat16" in reasons[name, "cpu"]
    assert reasons["block_sparse_attention", "cpu"].startswith(isa)
    assert reasons["layernorm_modulate", "cpu"].startswith("avx2" if isa == "avx512_bf16" else isa)


@pytest.mark.skipif(not library.HAS_TRITON, reason="triton is not installed")
def test_a_triton_kernel_says_for_which_dtypes_and_head_dims():
    reasons = {(o.name, o.device): o.reason for o in info.machine().operators}
    taken = "float32, bfloat16 and float16, head dim up to 128; others run on the reference"
    assert reasons["block_sparse_attention", "cuda"].endswith(taken)


def test_without_native_kernels_the_reason_is_the_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "NATIVE", tmp_path / "_native.so")
    written = {name for name, operator in library.OPERATORS.items() if "cpu" in operator.accepts}
    monkeypatch.setattr(
        library, "OPERATORS", {name: replace(operator, kernels={}) for name, operator in library.OPERATORS.items()}
    )
    machine = info.machine()
    assert machine.cpu.instruction_set is None
    on_cpu = [o for o in machine.operators if o.device == "cpu"]
    assert {o.kernel for o in on_cpu} == {"reference"}
    assert {o.reason for o in on_cpu if o.name in written} == {"installed without a C++ compiler"}


def test_an_operator_without_a_kernel_for_a_device_says_so():
    for operator in info.machine().operators:
        if operator.name == "qk_norm_rope_backward":
            assert operator.kernel == "reference"
            assert operator.reason == f"it has no {'C++' if operator.device == 'cpu' else 'Triton'} kernel"


def test_versions_are_those_of_the_installed_packages():
    versions = info.machine().versions
    assert versions["torch"] == torch.__version__
    assert versions["k5kernels"]


def test_an_engine_that_cannot_run_here_says_why():
    engines = {engine.name: engine for engine in info.machine().engines}
    assert engines["sdpa"].available
    assert engines["nabla"].available
    for name in ("flash2", "flash3", "sage"):
        assert engines[name].available or "is not installed" in engines[name].reason or torch.cuda.is_available()


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), RuntimeError("no kernel\nimage")])
def test_a_broken_engine_is_not_available(monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(info, "attention", broken)
    engines = info.machine().engines
    assert {engine.available for engine in engines} == {False}
    assert {engine.reason for engine in engines} == {" ".join(str(error).split())}


def test_the_json_is_the_whole_description():
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(asdict(info.machine())))


def test_the_tables_show_each_operator_and_engine_with_the_reason():
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["info"])
    assert result.exit_code == 0
    machine = info.machine()
    words = [word for o in machine.operators if o.device == "cpu" for word in (o.name, o.kernel, o.reason)]
    words += [word for engine in machine.engines for word in (engine.name, engine.reason)]
    assert [word for word in words if word not in result.stdout] == []
    assert f"torch {torch.__version__}" in result.stdout
