"""An installation without a compiler works on the references, and says so once."""

import shutil
import subprocess
import sys
from pathlib import Path

import k5kernels

SCRIPT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import k5kernels as k5
print(sum("without a C++ compiler" in str(warning.message) for warning in caught))
import torch
from k5kernels.ops.layernorm_modulate import layernorm_modulate_reference
from k5kernels.ops.library import OPERATORS, kernel_for
print({kernel_for(name, "cpu") for name in OPERATORS})
x, shift, scale = torch.randn(2, 5, 7), torch.randn(2, 7), torch.randn(2, 7)
expected = layernorm_modulate_reference(x, shift, scale, 1e-5, [0, 5])
print(torch.equal(k5.layernorm_modulate(x, shift, scale), expected))
layout = k5.TokenLayout((2, 9, 9))
q = torch.randn(1, 2, layout.tokens, 16)
print(k5.nabla_attention(q, q, q, layout, thr=0.5).shape == q.shape)
"""


def test_every_operator_runs_on_its_reference(tmp_path):
    package = Path(k5kernels.__file__).parent
    shutil.copytree(package, tmp_path / "k5kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == ["1", "{'reference'}", "True", "True"]
