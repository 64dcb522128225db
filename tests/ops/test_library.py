"""How an operator finds its kernels, and which of its implementations serves a call."""

import ast
import importlib
import inspect
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from k5kernels.ops import library
from k5kernels.ops.fractal import fractal_flatten_reference
from k5kernels.ops.library import Accepts, with_fallback

needs_native = pytest.mark.skipif(not library.NATIVE.exists(), reason="built without a C++ compiler")
needs_triton = pytest.mark.skipif(not library.HAS_TRITON, reason="triton is not installed")
ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
TRITON_FILES = sorted((Path(library.__file__).parent.parent / "triton").glob("*.py"))

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, k5kernels as k5
from k5kernels import info
from k5kernels.ops.library import OPERATORS, kernel_for
print({kernel_for(name, "cuda") for name in OPERATORS})
reasons = {operator.name: operator.reason for operator in info.machine().operators if operator.device == "cuda"}
print({reasons[name] for name in OPERATORS if "cuda" in OPERATORS[name].accepts})
x = torch.randn(1, 2, 9, 9, 3)
layout = k5.TokenLayout((2, 9, 9))
print(torch.equal(k5.fractal_unflatten(k5.fractal_flatten(x, layout), layout), x))
"""


def output(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def accepted_on(device):
    return {name for name, operator in library.OPERATORS.items() if device in operator.accepts}


def test_without_triton_the_references_serve_cuda():
    assert output(WITHOUT_TRITON) == ["{'reference'}", "{'triton is not installed'}", "True"]


@needs_native
def test_operators_accept_calls_on_the_cpu_exactly_where_a_cplusplus_kernel_is_bound():
    bound = {
        name for name in library.OPERATORS if torch._C._dispatch_has_kernel_for_dispatch_key(f"k5_cpu::{name}", "CPU")
    }
    assert "block_sparse_attention" in bound
    assert accepted_on("cpu") == bound


def test_operators_accept_calls_on_cuda_exactly_where_a_triton_launcher_is_written():
    functions = {
        (path.stem, node.name)
        for path in TRITON_FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    written = {
        name
        for name, operator in library.OPERATORS.items()
        if (operator.reference.__module__.rpartition(".")[2], name) in functions
    }
    assert "block_sparse_attention" in written
    assert accepted_on("cuda") == written


@pytest.mark.parametrize("path", TRITON_FILES, ids=lambda path: path.stem)
def test_gpu_kernels_import_no_operator(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in imports if node.module.startswith("k5kernels.ops")]


@needs_triton
@pytest.mark.parametrize("name", sorted(accepted_on("cuda")))
def test_the_launcher_takes_the_arguments_of_the_operator(name):
    schema = getattr(torch.ops.k5, name).default._schema
    reference = library.OPERATORS[name].reference
    module = importlib.import_module(reference.__module__.replace(".ops.", ".triton."))
    launcher = inspect.signature(getattr(module, name)).parameters
    count = len(schema.arguments)
    assert list(launcher)[:count] == list(inspect.signature(reference).parameters)
    # What a launcher takes beyond them is for those who call it by itself.
    assert all(launcher[further].default is not inspect.Parameter.empty for further in list(launcher)[count:])
    assert library.kernel_for(name, "cuda") == "Triton"


@needs_triton
def test_on_cuda_the_launcher_serves_its_dtypes_and_the_reference_the_others(monkeypatch):
    from k5kernels.triton import fractal

    launched = []

    def launcher(x, block_side):
        launched.append(x.dtype)
        return fractal_flatten_reference(x, block_side)

    monkeypatch.setattr(fractal, "fractal_flatten", launcher)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)  # there is none to make current
    for dtype in (torch.float32, torch.complex64, torch.bfloat16):
        x = torch.arange(2 * 9 * 9).view(1, 2, 9, 9, 1).to(dtype)
        out = torch.ops.k5.fractal_flatten.default.redispatch(ON_CUDA, x, 8)
        assert torch.equal(out, fractal_flatten_reference(x, 8))
    assert launched == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (torch.zeros(2, 8), None),
        (torch.zeros(2, 8, dtype=torch.float64), "float32 and bfloat16"),
        (torch.zeros(2, 9), "head dim up to 8"),
        (torch.zeros(3, 8), "an even number of rows"),
    ],
)
def test_a_call_that_breaks_a_condition_runs_on_the_reference_and_the_condition_can_be_read(argument, expected):
    accepts = Accepts(
        (torch.float32, torch.bfloat16), 8, {"an even number of rows": lambda x, factor: x.shape[0] % factor == 0}
    )
    serve = with_fallback(lambda x, factor: "kernel", accepts, lambda x, factor: "reference")
    assert accepts.why_not(argument, 2) == expected
    assert serve(argument, 2) == ("kernel" if expected is None else "reference")
    assert str(accepts) == "float32 and bfloat16, head dim up to 8, an even number of rows"


def test_attention_of_heads_wider_than_a_tile_runs_on_the_reference_on_cuda_and_in_cplusplus_on_the_cpu():
    accepts = library.OPERATORS["block_sparse_attention"].accepts
    assert accepts["cuda"].why_not(torch.zeros(1, 1, 1, 128)) is None
    assert accepts["cuda"].why_not(torch.zeros(1, 1, 1, 129)) == "head dim up to 128"
    assert accepts["cpu"].why_not(torch.zeros(1, 1, 1, 256)) is None
