"""What this machine can run: versions, CPU and GPUs, which kernel serves which operator, and attention engines."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from k5kernels import TokenLayout, __version__
from k5kernels.attention import ENGINES, Call, Engine
from k5kernels.device import choose_device
from k5kernels.ops import library

PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-3", "sageattention", "diffusers", "transformers", "av")
DEVICES = ("cpu", "cuda")
INSTRUCTION_SETS = ("portable", "avx2", "avx512_bf16")  # by the numbers of csrc/cpu/isa.h


@dataclass(frozen=True)
class CPU:
    """threads: of PyTorch and of our kernels. instruction_set: our C++ kernels' (one of INSTRUCTION_SETS), None where
    none were built. torch_capability: the widest that PyTorch's own kernels use."""

    threads: int
    instruction_set: str | None
    torch_capability: str


@dataclass(frozen=True)
class OperatorKernel:
    """The kernel ("C++", "Triton" or "reference") that serves `k5::name` on a device ("cpu" or "cuda"), and why."""

    name: str
    device: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class AttentionEngine:
    """An engine of `k5kernels.attention`: whether it runs on `device`, and why not where it does not."""

    name: str
    device: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Machine:
    """versions: of this library, Python and each package that matters here, None where it is not installed."""

    versions: dict[str, str | None]
    cpu: CPU
    gpus: list[str]
    operators: list[OperatorKernel]
    engines: list[AttentionEngine]


def machine() -> Machine:
    """Describe the machine and the installation this process runs on."""
    device = choose_device().type
    versions: dict[str, str | None] = {"k5kernels": __version__, "python": platform.python_version()}
    return Machine(
        versions=versions | {name: _version(name) for name in PACKAGES},
        cpu=CPU(torch.get_num_threads(), _instruction_set(), torch.backends.cpu.get_cpu_capability()),
        gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        operators=[_operator(name, device) for name in sorted(library.OPERATORS) for device in DEVICES],
        engines=[_engine(engine, device) for engine in ENGINES.values()],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _instruction_set() -> str | None:
    return INSTRUCTION_SETS[torch.ops.k5_cpu.isa()] if library.NATIVE.exists() else None


def _operator(name: str, device: str) -> OperatorKernel:
    return OperatorKernel(name, device, library.kernel_for(name, device), _reason(name, device))


def _reason(name: str, device: str) -> str:
    operator = library.OPERATORS[name]
    if device in operator.kernels:
        build = _instruction_set_of(name) if device == "cpu" else "compiled when first launched"
        return f"{build}; {operator.accepts[device]}; others run on the reference"
    if device not in operator.accepts:
        return f"it has no {library.LANGUAGES[device]} kernel"
    return "installed without a C++ compiler" if device == "cpu" else "triton is not installed"


def _instruction_set_of(name: str) -> str | None:
    """Files of csrc/cpu whose names begin with one word have kernels of one family, which are built alike."""
    instructions = _instruction_set()
    if instructions != "avx512_bf16":
        return instructions
    families = {file.partition("_")[0] for file in torch.ops.k5_cpu.avx512_files().split(",")}
    return instructions if name.partition("_")[0] in families else "avx2"


def _engine(engine: Engine, device: str) -> AttentionEngine:
    """Ask it about one block, and run that: an installed package may still be broken, or built for another GPU."""
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    call = Call.of(q, q, q, TokenLayout(((1, 8, 8),)))
    reason = engine.why_not(call)
    if reason is None:
        try:
            engine.run(q, q, q, call)
        except Exception as error:  # whatever a foreign package raises is the reason that is shown
            reason = f"it fails: {' '.join(str(error).split()) or type(error).__name__}"
    return AttentionEngine(engine.name, device, reason is None, reason or f"runs on {device}")
