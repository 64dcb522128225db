"""Compiles a launch ahead of time and reads what it uses from the binary, with the tools inside the triton package."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.gpu_report.launches import Variant
from bench.gpu_report.sass import product_loop
from k5kernels.triton.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
REGISTERS = 1 << 16  # of a multiprocessor, on all of these
REGISTERS_AT_ONCE = 256  # a warp is given a multiple of these
SHARED_RESERVED = KIB  # of each thread block, by the driver
TENSOR_MEMORY = 512  # columns of a multiprocessor, where there is any


@dataclass(frozen=True)
class Arch:
    """Limits of a compute capability, from the CUDA programming guide's table of technical specifications.

    shared_limit: bytes a thread block may have; shared: of the multiprocessor. mma: the SASS instruction of its
    fastest tensor-core path.
    """

    name: str
    capability: int
    shared_limit: int
    shared: int
    warps: int
    thread_blocks: int
    mma: str


ARCHS = (
    Arch("sm_80", 80, 163 * KIB, 164 * KIB, 64, 32, "HMMA"),
    Arch("sm_90a", 90, 227 * KIB, 228 * KIB, 64, 32, "HGMMA"),
    Arch("sm_100a", 100, 227 * KIB, 228 * KIB, 64, 32, "UTCMMA"),
    Arch("sm_120a", 120, 99 * KIB, 100 * KIB, 48, 24, "HMMA"),
)
# UTCMMA is tcgen05 (UTCHMMA for bf16), HGMMA is wgmma, HMMA is mma.sync.
MMA_PATTERNS = {"UTCMMA": r"\bUTC\w*MMA\b", "HGMMA": r"\bHGMMA\b", "HMMA": r"\bHMMA\b"}
TMA_PATTERN = r"\bUTMA(?:LDG|STG)\b"
SPILL_PATTERN = r"\b(?:LDL|STL)\b"
# ptxas says so where it makes every wgmma wait for the one before, and why.
SERIALIZED_PATTERN = r"\(C751[0-4]\)"


@dataclass(frozen=True)
class Resources:
    """What one variant uses on one architecture. spills: instructions on local memory; shared: bytes a thread block;
    mma and tma: instructions; thread_blocks: resident on a multiprocessor; occupancy: resident warps, of the most there
    can be. Of kernels with wgmma, serialized: ptxas's warnings that it lets products wait for each other; loop: `Loop`
    in words."""

    registers: int
    spills: int
    shared: int
    mma_kind: str
    mma: int
    tma: int
    warps: int
    thread_blocks: int
    occupancy: float
    serialized: int
    loop: str


@dataclass(frozen=True)
class _NoGPU:
    """In place of triton's driver: all that its launcher asks in order to compile."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_for(arch: Arch) -> Iterator[None]:
    try:
        before = driver.active
    except RuntimeError:  # this machine has no GPU
        before = None
    driver.set_active(_NoGPU(arch.capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_launch(launch: Launch, arch: Arch) -> Resources:
    """Compile through triton's own launcher, which specializes on the arguments as on a GPU, and read the binary.

    Raises triton's CompilationError where the kernel does not compile.
    """
    with _compiling_for(arch):
        binary = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"\bREG:(\d+)", usage)[0])
    counts = {kind: len(re.findall(pattern, sass)) for kind, pattern in MMA_PATTERNS.items()}
    kind = max(counts, key=counts.__getitem__)
    warps, shared = _launched_warps(binary), binary.metadata.shared
    thread_blocks = _thread_blocks(arch, registers, shared, warps, getattr(binary.metadata, "tmem_size", 0) or 0)
    wgmma = counts["HGMMA"] > 0
    return Resources(
        registers=registers,
        spills=len(re.findall(SPILL_PATTERN, sass)),
        shared=shared,
        mma_kind=kind if counts[kind] else "",
        mma=counts[kind],
        tma=len(re.findall(TMA_PATTERN, sass)),
        warps=warps,
        thread_blocks=thread_blocks,
        occupancy=thread_blocks * warps / arch.warps,
        serialized=_serialized(binary.asm["ptx"], arch) if wgmma else 0,
        loop=str(product_loop(sass) or "") if wgmma else "",
    )


def violations(variant: Variant, arch: Arch, used: Resources) -> list[str]:
    """What breaks the gate: no spills, shared memory under the limit, tensor cores wherever there is a dot."""
    found = []
    if used.spills:
        found.append(f"{used.spills} instructions spill registers")
    if used.shared > arch.shared_limit:
        found.append(f"{used.shared} bytes of shared memory, over the limit of {arch.shared_limit}")
    if variant.has_dot and used.mma_kind != arch.mma:
        found.append(f"tl.dot became {used.mma_kind or 'no tensor-core instruction'}, expected {arch.mma}")
    if used.serialized:
        found.append(f"ptxas serializes wgmma ({used.serialized} warnings)")
    return [f"{variant.name} D={variant.head_dim} on {arch.name}: {what}" for what in found]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _launched_warps(binary: Any) -> int:
    """Warps of a thread block, those that warp specialization adds included."""
    threads = re.search(r"\.reqntid (\d+)", binary.asm["ptx"])
    return int(threads[1]) // 32 if threads else binary.metadata.num_warps


def _serialized(ptx: str, arch: Arch) -> int:
    """How often ptxas warns that it serializes wgmma; triton does not pass on what it says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(TOOLS / "ptxas"), "-v", f"--gpu-name={arch.name}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return len(re.findall(SERIALIZED_PATTERN, said.stdout + said.stderr))


def _thread_blocks(arch: Arch, registers: int, shared: int, warps: int, tensor_memory: int) -> int:
    registers_of_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    limits = [
        arch.thread_blocks,
        arch.warps // warps,
        REGISTERS // registers_of_warp // warps,
        arch.shared // (shared + SHARED_RESERVED),
    ]
    if tensor_memory:
        limits.append(TENSOR_MEMORY // tensor_memory)
    return min(limits)
