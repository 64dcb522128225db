"""What `import k5kernels` gives, and what it does not load."""

import inspect
import json
import operator
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import k5kernels as k5
from k5kernels.ops.library import OPERATORS

FUNCTIONS = [
    "attention",
    "block_sparse_attention",
    "fractal_flatten",
    "fractal_unflatten",
    "gated_residual",
    "groupnorm_silu",
    "layernorm_modulate",
    "nabla_attention",
    "nabla_mask",
    "qk_norm_rope",
    "sta_mask",
]
CLASSES = ["BlockMask", "TokenLayout"]
MODULES = {
    "vae": ["HunyuanEncoder", "HunyuanDecoder"],
    "cache": ["MagCache"],
    "offload": ["ActivationOffload"],
    "planner": ["step_time_ms", "memory_bytes", "parameters"],
}


# The arguments of every public name and their order; what an argument of ours adds stands after them, with a default.
ARGUMENTS = {
    "TokenLayout": ["clips", "block_side"],
    "attention": ["q", "k", "v", "engine", "layout"],
    "block_sparse_attention": ["q", "k", "v", "mask", "layout", "scale"],
    "fractal_flatten": ["x", "layout"],
    "fractal_unflatten": ["x", "layout"],
    "gated_residual": ["x", "y", "gate"],
    "groupnorm_silu": ["x", "weight", "bias", "groups", "eps"],
    "layernorm_modulate": ["x", "shift", "scale", "eps"],
    "nabla_attention": ["q", "k", "v", "layout", "thr", "sta"],
    "nabla_mask": ["q", "k", "layout", "thr", "sta"],
    "qk_norm_rope": ["q", "k", "q_weight", "k_weight", "cos", "sin", "eps"],
    "sta_mask": ["layout", "window"],
    "planner.memory_bytes": ["model_dim", "time_dim", "ff_dim", "blocks", "tokens", "gpus", "offload"],
    "planner.step_time_ms": ["model_dim", "pixels", "blocks", "batch"],
}
DEFAULTS = {
    "TokenLayout": {"block_side": 8},
    "attention": {"engine": "auto", "layout": None},
    "block_sparse_attention": {"scale": None},
    "nabla_attention": {"sta": None},
    "nabla_mask": {"sta": None},
}


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a process has that imported the package and nothing else."""
    code = (
        "import json, sys, k5kernels; modules = list(sys.modules); from k5kernels.ops import library; "
        "native = [name for name in library.OPERATORS if library.kernel_for(name, 'cpu') == 'C++']; "
        "print(json.dumps({'modules': modules, 'built': library.NATIVE.exists(), 'native': native}))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_and_attention_are_functions_of_the_package(name):
    assert callable(getattr(k5, name))
    assert not isinstance(getattr(k5, name), ModuleType)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_have_the_agreed_names_and_order(name):
    parameters = inspect.signature(operator.attrgetter(name)(k5)).parameters
    agreed = ARGUMENTS[name]
    assert list(parameters)[: len(agreed)] == agreed
    assert all(
        parameters[further].default is not inspect.Parameter.empty for further in list(parameters)[len(agreed) :]
    )
    for argument, default in DEFAULTS.get(name, {}).items():
        assert parameters[argument].default == default


def test_every_function_and_class_has_its_arguments_agreed():
    """A mask is made by functions and class methods, so that BlockMask's own arguments are free to change."""
    public = {name for name in k5.__all__ if not isinstance(getattr(k5, name), ModuleType)}
    assert {name for name in ARGUMENTS if "." not in name} == public - {"BlockMask"}


@pytest.mark.parametrize("name", ["density", "to_dense", "to_flex", "from_flex", "from_dense"])
def test_block_masks_convert_to_and_from_other_forms(name):
    assert hasattr(k5.BlockMask, name)


def test_every_operator_has_an_opcheck():
    tests = (Path(__file__).parent / "ops").glob("test_*.py")
    checked = {name for path in tests for name in re.findall(r"opcheck\(\s*torch\.ops\.k5\.(\w+)", path.read_text())}
    assert checked == set(OPERATORS)


@pytest.mark.parametrize("name", CLASSES)
def test_layouts_and_masks_are_classes_of_the_package(name):
    assert isinstance(getattr(k5, name), type)


@pytest.mark.parametrize("module", MODULES)
def test_subpackages_are_loaded_with_the_package(module):
    assert all(hasattr(getattr(k5, module), name) for name in MODULES[module])


def test_all_lists_exactly_the_public_names():
    assert sorted(k5.__all__) == sorted([*FUNCTIONS, *CLASSES, *MODULES])


def test_attention_is_callable_as_a_name_of_the_package_and_its_subpackage_importable():
    from k5kernels.attention import nabla_attention

    assert nabla_attention is k5.nabla_attention
    q = torch.randn(1, 2, 5, 4)
    torch.testing.assert_close(k5.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_the_version_is_that_of_the_distribution():
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert k5.__version__ == pyproject["project"]["version"]


def test_the_import_finds_the_native_kernels(imported):
    assert ("layernorm_modulate" in imported["native"]) == imported["built"]


def test_the_import_registers_every_operator(imported):
    modules = {f"k5kernels.ops.{path.stem}" for path in (Path(k5.__file__).parent / "ops").glob("[a-z]*.py")}
    assert modules == {name for name in imported["modules"] if name.startswith("k5kernels.ops.")}


def test_the_import_leaves_video_shards_the_command_line_and_the_compiler_alone(imported):
    heavy = ["av", "webdataset", "typer", "rich", "diffusers", "transformers", "fsspec", "torch._dynamo"]
    assert [name for name in heavy if name in imported["modules"]] == []


def test_the_import_leaves_the_gpu_kernels_alone(imported):
    assert [name for name in imported["modules"] if name.startswith("k5kernels.triton")] == []
