"""Memory of this process, on the host or on a GPU; and whether freed host memory goes back to the system."""

import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

HOST = torch.device("cpu")
SETS_ALLOCATOR = sys.platform == "linux"
_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device = HOST) -> int:
    """The most memory that this process has held so far: resident on the host, or reserved by PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # Linux hands a child its parent's `ru_maxrss`; VmHWM belongs to the process alone.
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes(device: torch.device = HOST) -> int:
    """The memory that this process holds now, as in `peak_bytes`; the peak where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return _status_bytes("VmRSS") if _STATUS.exists() else peak_bytes()


def forget_peak() -> None:
    """Let `peak_bytes` of the host begin anew with what is held now (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024  # type: ignore[index]  # Linux has it


def reuse_memory(reuse: bool) -> None:
    """Let large tensors reuse freed memory, or let each take fresh pages and return them to the system (glibc only).

    Fresh pages cost time. Reused memory fragments where tensors have many sizes, and the process can grow to twice
    what its tensors hold.
    """
    if SETS_ALLOCATOR:
        mmap_threshold, trim_threshold = -3, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30 if reuse else 1 << 16)
        libc.mallopt(trim_threshold, (1 << 31) - 1 if reuse else 1 << 16)
        if not reuse:
            libc.malloc_trim(0)
