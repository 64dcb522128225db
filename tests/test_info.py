"""What `k5 info` tells of this machine."""

import json
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from k5kernels import info
from k5kernels.attention import ENGINES, Engine
from k5kernels.cli import app
from k5kernels.ops import library

ROOT = Path(__file__).parent.parent
NATIVE = (ROOT / "k5kernels" / "_native.so").exists()
TRITON = find_spec("triton") is not None


def written(pattern: str, sources: str) -> set[str]:
    """What a pattern captures in the sources: the names of the kernels that somebody wrote."""
    return {name for path in ROOT.glob(sources) for name in re.findall(pattern, path.read_text(), re.MULTILINE)}


def test_every_operator_is_listed_with_the_kernel_that_was_written_for_each_device():
    cpp = written(r'm\.impl\("(\w+)"', "csrc/*.cpp")
    triton = written(r"^def (\w+)\(", "k5kernels/triton/*.py")
    operators = written(r"opcheck\(\s*torch\.ops\.k5\.(\w+)", "tests/ops/test_*.py")
    assert "layernorm_modulate" in operators & cpp
    assert "nabla_mask" in operators & cpp & triton
    expected = {(name, "cpu"): "C++" if NATIVE and name in cpp else "reference" for name in operators}
    expected |= {(name, "cuda"): "Triton" if TRITON and name in triton else "reference" for name in operators}
    assert {(o.name, o.device): o.kernel for o in info.machine().operators} == expected


def test_the_instruction_set_is_the_one_in_use(isa):
    cpu = info.machine().cpu
    assert cpu.instruction_set == (None if isa == "reference" else isa)
    assert cpu.threads == torch.get_num_threads()


def test_a_native_kernel_says_for_which_dtypes_and_with_which_instructions(isa):
    if isa == "reference":
        pytest.skip("installed without a C++ compiler")
    reasons = {(o.name, o.device): o.reason for o in info.machine().operators}
    for name in ("layernorm_modulate", "groupnorm_silu", "nabla_mask"):
        assert "float32 and bfloat16" in reasons[name, "cpu"]
    assert reasons["layernorm_modulate", "cpu"].startswith(isa)
    assert reasons["groupnorm_silu", "cpu"].startswith(isa)
    assert reasons["nabla_mask", "cpu"].startswith("avx2" if isa == "avx512_bf16" else isa)


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
    (operator,) = (o for o in info.machine().operators if (o.name, o.device) == ("bits_attention", "cpu"))
    assert operator.kernel == "reference"
    assert operator.reason == "it has no C++ kernel"


def test_versions_are_those_of_the_installed_packages():
    versions = info.machine().versions
    assert versions["torch"] == torch.__version__
    assert versions["k5kernels"]


PACKAGES = {
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
    "flash2": "flash_attn",
    "sage": "sageattention",
}


def test_pytorchs_attention_and_nabla_run_on_every_machine_and_the_others_say_what_is_missing():
    engines = {engine.name: engine for engine in info.machine().engines}
    assert set(engines) == {"sdpa", "native", "nabla", "flex", *PACKAGES}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("sdpa", "nabla"):
        assert engines[name] == info.AttentionEngine(name, device, True, f"runs on {device}")
    for name, module in PACKAGES.items():
        if device == "cpu":
            expected = "it runs on CUDA, the tensors are on cpu"
            assert engines[name] == info.AttentionEngine(name, "cpu", False, expected)
        elif find_spec(module.partition(".")[0]) is None:
            assert not engines[name].available
            assert engines[name].reason.endswith("is not installed")


class Toy(Engine):
    """An engine of someone else's, which refuses every call or fails in it."""

    name = "toy"

    def __init__(self, refusal=None, failure=None):
        self.refusal, self.failure = refusal, failure

    def why_not(self, call):
        return self.refusal

    def run(self, q, k, v, call):
        if self.failure is not None:
            raise self.failure
        return q


@pytest.mark.parametrize(
    ("toy", "available", "reason"),
    [
        (Toy(), True, "runs on "),
        (Toy(refusal="it is for Sundays"), False, "it is for Sundays"),
        (Toy(failure=ImportError("undefined symbol")), False, "it fails: undefined symbol"),
        (Toy(failure=RuntimeError("no kernel\nimage")), False, "it fails: no kernel image"),
        (Toy(failure=AssertionError()), False, "it fails: AssertionError"),
    ],
)
def test_an_engine_that_refuses_or_fails_is_listed_with_the_reason(monkeypatch, toy, available, reason):
    monkeypatch.setitem(ENGINES, "toy", toy)
    engine = info.machine().engines[-1]
    assert (engine.name, engine.available) == ("toy", available)
    assert engine.reason.startswith(reason)


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
