"""The `k5::` operator library: how an operator is registered, and which kernels this machine has for it.

`k5::X` is what callers see. csrc/ implements `k5_cpu::X`, with the same schema, for the dtypes in
CPU_DTYPES; `k5::X` on the CPU goes there for those and to the reference for the others.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NATIVE = Path(__file__).parent.parent / "_native.so"
CPU_DTYPES = (torch.float32, torch.bfloat16)

_LIBRARY = torch.library.Library("k5", "DEF")
_CPU_LIBRARY = torch.library.Library("k5_cpu", "DEF")
_REFERENCES: dict[str, Callable[..., Any]] = {}


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define `k5::<schema>` with the reference as its default kernel on every device.

    fake: shapes and dtypes of the result without computing it. backward and setup_context: as in
    `torch.library.register_autograd`; an operator without them is not differentiable.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"k5::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"k5::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    _CPU_LIBRARY.define(schema)
    _REFERENCES[name] = reference


def operator_names() -> list[str]:
    """Names of the registered operators, without `k5::`."""
    return sorted(_REFERENCES)


def kernel_for(name: str, device: str) -> str:
    """What serves `k5::name` on "cpu" or "cuda": "C++", "Triton" or "reference"."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"k5::{name}", device.upper()):
        return "reference"
    return {"cpu": "C++", "cuda": "Triton"}[device]


def load_native() -> None:
    """Load the C++ kernels; where none were built, say once that the references serve."""
    if not NATIVE.exists():
        warnings.warn(
            "k5kernels was installed without a C++ compiler: CPU operators run on their PyTorch references; "
            "reinstall with a compiler and cmake for the fast ones",
            stacklevel=2,
        )
        return
    torch.ops.load_library(str(NATIVE))
    for name, reference in _REFERENCES.items():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"k5_cpu::{name}", "CPU"):
            _LIBRARY.impl(name, _native_kernel(getattr(torch.ops.k5_cpu, name).default, reference), "CPU")


def _native_kernel(native: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The C++ kernel where it has the first argument's dtype, else the reference."""

    def kernel(first: torch.Tensor, *rest: Any) -> Any:
        return (native if first.dtype in CPU_DTYPES else reference)(first, *rest)

    return kernel
