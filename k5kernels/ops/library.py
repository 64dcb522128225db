"""The `k5::` operator library: how an operator is registered, and which implementation serves a call.

Callers see `k5::X`, whose default implementation on every device is its reference in plain PyTorch. A kernel for a
kind of device is found by the operator's name:

- "cpu": C++ in csrc/, bound as `k5_cpu::X` with the same schema;
- "cuda": Triton, the function X of the file in k5kernels/triton/ that has the name of the file its reference stands
  in, imported when it is first launched.

The operator says what each of its kernels accepts. A call that the kernel of its device does not accept runs on the
reference. That decision is made here and nowhere else: a kernel may rely on it.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

NATIVE = Path(__file__).parent.parent / "_native.so"
LANGUAGES = {"cpu": "C++", "cuda": "Triton"}
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = find_spec("triton")
HAS_TRITON = _TRITON is not None and _TRITON.origin is not None  # a mere folder of that name has no origin

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Accepts:
    """What a kernel takes.

    dtypes: of the operator's first argument. largest_head_dim: of the last dimension of the first argument; None where
    the kernel takes any. others: further conditions, each a function of the operator's arguments by the words that
    say what it asks for.
    """

    dtypes: tuple[torch.dtype, ...]
    largest_head_dim: int | None = None
    others: Mapping[str, Callable[..., bool]] = field(default_factory=dict)

    def why_not(self, first: torch.Tensor, *rest: Any) -> str | None:
        """The first condition that a call with these arguments breaks, in words; None where the kernel takes it."""
        if first.dtype not in self.dtypes:
            return _names(self.dtypes)
        if self.largest_head_dim is not None and first.shape[-1] > self.largest_head_dim:
            return self._head_dims()
        return next((words for words, holds in self.others.items() if not holds(first, *rest)), None)

    def __str__(self) -> str:
        """All conditions, as in "float32 and bfloat16, head dim up to 128"."""
        limit = [] if self.largest_head_dim is None else [self._head_dims()]
        return ", ".join([_names(self.dtypes), *limit, *self.others])

    def _head_dims(self) -> str:
        return f"head dim up to {self.largest_head_dim}"


@dataclass(frozen=True)
class Operator:
    """reference: the definition. accepts: of each kernel written for it, by device. kernels: those that this
    installation can run, by device."""

    reference: Implementation
    accepts: Mapping[str, Accepts]
    kernels: Mapping[str, Implementation]


OPERATORS: dict[str, Operator] = {}
_LIBRARY = torch.library.Library("k5", "DEF")
_CPU_LIBRARY = torch.library.Library("k5_cpu", "DEF")


def register(
    reference: Implementation,
    fake: Implementation,
    backward: Implementation | None = None,
    setup_context: Callable[..., None] | None = None,
    *,
    accepts: Mapping[str, Accepts] | None = None,
) -> None:
    """Define the operator `k5::X` whose reference is the function `X_reference`.

    The schema is that of the reference's annotations: `torch.library.infer_schema`. fake: shapes and dtypes of the
    result without computing it. backward and setup_context: as in `torch.library.register_autograd`; an operator
    without them is not differentiable. accepts: what the kernels of the operator take, by the device they are for
    ("cpu", "cuda"); a device that is not named has no kernel.
    """
    name = reference.__name__.removesuffix("_reference")
    schema = torch.library.infer_schema(reference, mutates_args=(), op_name=name)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"k5::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"k5::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    _CPU_LIBRARY.define(schema)
    accepts = accepts or {}
    found = {"cpu": _native_kernel(name), "cuda": _triton_kernel(name, reference.__module__)}
    kernels = {device: kernel for device in accepts if (kernel := found[device]) is not None}
    OPERATORS[name] = Operator(reference, accepts, kernels)
    for device, kernel in kernels.items():
        _LIBRARY.impl(name, with_fallback(kernel, accepts[device], reference), device.upper())


def with_fallback(kernel: Implementation, accepts: Accepts, reference: Implementation) -> Implementation:
    """The kernel for the calls it accepts, the reference for the others."""

    def serve(*arguments: Any) -> Any:
        return (kernel if accepts.why_not(*arguments) is None else reference)(*arguments)

    return serve


def kernel_for(name: str, device: str) -> str:
    """What serves `k5::name` on "cpu" or "cuda" where its kernel accepts the call: "C++", "Triton" or "reference"."""
    return LANGUAGES[device] if device in OPERATORS[name].kernels else "reference"


def _native_kernel(name: str) -> Implementation | None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"k5_cpu::{name}", "CPU"):
        return None
    return getattr(torch.ops.k5_cpu, name).default


def _triton_kernel(name: str, module: str) -> Implementation | None:
    if not HAS_TRITON:
        return None
    file = f"k5kernels.triton.{module.rpartition('.')[2]}"

    def launch(first: torch.Tensor, *rest: Any) -> Any:
        launcher = getattr(importlib.import_module(file), name)
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return launcher(first, *rest)

    return launch


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    """ "float32, bfloat16 and float16" """
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} and {last}" if others else last


def _load_native() -> None:
    """Load the C++ kernels; where none were built, say once that the references serve."""
    if NATIVE.exists():
        torch.ops.load_library(str(NATIVE))
    else:
        warnings.warn(
            "k5kernels was installed without a C++ compiler: CPU operators run on their PyTorch references; "
            "reinstall with a compiler and cmake for the fast ones",
            stacklevel=2,
        )


# Before any operator is registered: registration looks for its C++ kernel.
_load_native()
