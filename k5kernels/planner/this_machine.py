"""What of a hardware profile this machine says itself, before its steps are measured."""

import os
import platform
from pathlib import Path

import torch

from k5kernels.planner.profile import HardwareProfile


def this_machine() -> HardwareProfile:
    """The report's H100 with this machine's name and memory, and one device a node; coefficients are still to fit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = torch.get_num_threads()
    name = f"{names[0] if names else platform.machine()}, {threads} threads"
    return HardwareProfile(name, memory_bytes=memory, gpus_per_node=1)
