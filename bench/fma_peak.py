"""The peak float32 rate of the cores, measured by fused multiply-adds on registers: the roof of every kernel here."""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
STEPS = 1 << 23  # float32 holds every integer up to twice this


class FmaPeak:
    """Multiplications and additions in registers, on torch's threads.

    Calling it returns what each of its sums has counted, [threads, sums], all of it `STEPS`. operations: floating-point
    operations of a call. Raises subprocess.CalledProcessError where the compiler, $CXX or c++, fails.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "fma_peak.so"
            subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, SOURCE, "-o", library], check=True)
            loaded = ctypes.CDLL(str(library))
        self._multiply_and_add = loaded.multiply_and_add
        self._multiply_and_add.argtypes = [
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_float,
            ctypes.c_float,
            ctypes.c_void_p,
        ]
        self._shape = torch.get_num_threads(), loaded.sums_of_thread()
        self.operations = 2 * STEPS * self._shape[0] * self._shape[1]

    def __call__(self) -> Tensor:
        counts = torch.zeros(self._shape)
        self._multiply_and_add(self._shape[0], STEPS, 1, 1, counts.data_ptr())
        return counts
