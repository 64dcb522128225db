"""How operators reach the Triton kernels: by name and dtype, imported late, and not at all without triton."""

import importlib
import inspect
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from k5kernels.ops import library
from k5kernels.ops.fractal import fractal_flatten_reference

needs_triton = pytest.mark.skipif(not library.HAS_TRITON, reason="triton is not installed")
ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, k5kernels as k5
from k5kernels import info
from k5kernels.ops.library import kernel_for, operator_names
print({kernel_for(name, "cuda") for name in operator_names()})
print({operator.reason for operator in info.machine().operators if operator.device == "cuda"})
x = torch.randn(1, 2, 9, 9, 3)
layout = k5.TokenLayout((2, 9, 9))
print(torch.equal(k5.fractal_unflatten(k5.fractal_flatten(x, layout), layout), x))
"""
IMPORTED = """
import sys, k5kernels
print([name for name in sys.modules if name.startswith("k5kernels.triton")])
"""


def output(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_triton_the_references_serve_cuda():
    assert output(WITHOUT_TRITON) == ["{'reference'}", "{'no Triton kernel: triton is not installed'}", "True"]


def test_the_gpu_kernels_are_not_imported_with_the_library():
    assert output(IMPORTED) == ["[]"]


@needs_triton
@pytest.mark.parametrize("name", [name for name in library.operator_names() if library.dtypes_of(name, "cuda")])
def test_the_launcher_takes_the_arguments_of_the_operator(name):
    schema = getattr(torch.ops.k5, name).default._schema
    reference = library._REFERENCES[name]
    module = importlib.import_module(reference.__module__.replace(".ops.", ".triton."))
    launcher = inspect.signature(getattr(module, name))
    assert len(launcher.parameters) == len(schema.arguments)
    assert list(launcher.parameters) == list(inspect.signature(reference).parameters)
    assert library.kernel_for(name, "cuda") == "Triton"


@needs_triton
def test_on_cuda_the_launcher_serves_its_dtypes_and_the_reference_the_others(monkeypatch):
    from k5kernels.triton import fractal

    launched = []

    def launcher(x, patch):
        launched.append(x.dtype)
        return fractal_flatten_reference(x, patch)

    monkeypatch.setattr(fractal, "fractal_flatten", launcher)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)  # there is none to make current
    for dtype in (torch.float32, torch.complex64, torch.bfloat16):
        x = torch.arange(2 * 9 * 9).view(1, 2, 9, 9, 1).to(dtype)
        out = torch.ops.k5.fractal_flatten.default.redispatch(ON_CUDA, x, 8)
        assert torch.equal(out, fractal_flatten_reference(x, 8))
    assert launched == [torch.float32, torch.bfloat16]
