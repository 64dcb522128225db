"""The `k5::` operator library: how an operator is registered, and which kernels this machine has for it.

`k5::X` is what callers see. csrc/ implements `k5_cpu::X`, with the same schema, for the dtypes the operator names;
`k5::X` on the CPU goes there for those and to the reference for the others. On CUDA it goes likewise to the function X
of k5kernels/triton/, where triton is installed.
"""

import importlib
import warnings
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

NATIVE = Path(__file__).parent.parent / "_native.so"
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = find_spec("triton")
HAS_TRITON = _TRITON is not None and _TRITON.origin is not None  # a mere folder of that name has no origin

_LIBRARY = torch.library.Library("k5", "DEF")
_CPU_LIBRARY = torch.library.Library("k5_cpu", "DEF")
_REFERENCES: dict[str, Callable[..., Any]] = {}
# What the kernels of an operator take, by the device they run on.
_KERNEL_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {}


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    cpu_dtypes: Collection[torch.dtype] = CPU_DTYPES,
    triton_dtypes: Collection[torch.dtype] = (),
) -> None:
    """Define `k5::<schema>` with the reference as its default kernel on every device.

    fake: shapes and dtypes of the result without computing it. backward and setup_context: as in
    `torch.library.register_autograd`; an operator without them is not differentiable.
    cpu_dtypes, triton_dtypes: of the first argument, those that the C++ kernel, and the operator's function in
    k5kernels/triton/, take; that function has the operator's name and arguments, its file the name of the file the
    reference stands in.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"k5::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"k5::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    _CPU_LIBRARY.define(schema)
    _REFERENCES[name] = reference
    _KERNEL_DTYPES[name] = {"cpu": tuple(cpu_dtypes), "cuda": tuple(triton_dtypes) if HAS_TRITON else ()}
    if dtypes_of(name, "cuda"):
        _LIBRARY.impl(name, _triton_kernel(name, reference), "CUDA")


def operator_names() -> list[str]:
    """Names of the registered operators, without `k5::`."""
    return sorted(_REFERENCES)


def kernel_for(name: str, device: str) -> str:
    """What serves `k5::name` on "cpu" or "cuda": "C++", "Triton" or "reference"."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"k5::{name}", device.upper()):
        return "reference"
    return {"cpu": "C++", "cuda": "Triton"}[device]


def dtypes_of(name: str, device: str) -> tuple[torch.dtype, ...]:
    """The dtypes of the first argument that a kernel for `device` would take; others run on the reference."""
    return _KERNEL_DTYPES[name][device]


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
            _LIBRARY.impl(name, _native_kernel(name, reference), "CPU")


def _native_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The C++ kernel where it has the first argument's dtype, else the reference."""
    native, dtypes = getattr(torch.ops.k5_cpu, name).default, dtypes_of(name, "cpu")

    def kernel(first: torch.Tensor, *rest: Any) -> Any:
        return (native if first.dtype in dtypes else reference)(first, *rest)

    return kernel


def _triton_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton kernel, imported when first launched, where it has the first argument's dtype, else the reference."""
    module = f"k5kernels.triton.{reference.__module__.rpartition('.')[2]}"
    dtypes = dtypes_of(name, "cuda")

    def kernel(first: torch.Tensor, *rest: Any) -> Any:
        if first.dtype not in dtypes:
            return reference(first, *rest)
        launcher = getattr(importlib.import_module(module), name)
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return launcher(first, *rest)

    return kernel
