"""The limit of GroupNorm + SiLU in bfloat16: what must be read, computed and written, in a bare loop."""

import ctypes
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
TRIES = 3
FETCHED_AHEAD = 8192  # values


class BarePass:
    """A pass over memory of its own. Calling it returns what it wrote, which should be near `expected`."""

    def __init__(self, run: Callable[[int], Tensor], ways: int, expected: Tensor) -> None:
        def seconds(way: int) -> float:
            start = time.perf_counter()
            run(way)
            return time.perf_counter() - start

        self.expected = expected
        self._run = run
        self._way = min(range(ways), key=lambda way: min(seconds(way) for _ in range(TRIES)))

    def __call__(self) -> Tensor:
        return self._run(self._way)


class SiluLimit:
    """Makes bare passes on torch's threads, each in the way that is fastest here: sixteen, thirty-two or twice
    thirty-two values at a time, with or without fetching values and address translations ahead, written past the caches
    or through them.

    Raises subprocess.CalledProcessError where the compiler, $CXX or c++, fails.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "silu_limit.so"
            subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, SOURCE, "-o", library], check=True)
            self._library = ctypes.CDLL(str(library))
        self._ways, self._channels, self._part = (
            getattr(self._library, f"silu_{name}")() for name in ("ways", "channels", "part")
        )
        # ln(2), which the gradient is multiplied by there, goes out again with the weight.
        scale, shift, weight, linear, constant = 1.0, 0.0, 1 / math.log(2), 0.0, 0.0
        self._terms = torch.tensor([scale, shift, weight, linear, constant]).repeat_interleave(self._channels)

    def forward(self, values: int, copies: int) -> BarePass:
        """Reads about so many values and writes silu of each and so many copies, which it does not compute."""
        parts = values // self._part
        own_copies = copies // parts // self._channels * self._channels
        x, out = self._random(parts), torch.empty(parts * (self._part + own_copies), dtype=torch.bfloat16)

        def run(way: int) -> Tensor:
            self._call("silu_forward", way, self._terms, x, out, parts * self._part, parts * own_copies)
            return out

        z = self._z(x, parts)
        expected = torch.cat([z * z.sigmoid(), z.new_zeros(parts, own_copies)], dim=1).flatten()
        return BarePass(run, self._ways, expected)

    def backward(self, values: int) -> BarePass:
        """Reads about so many values x for their statistics, x and grad for sums, and both for what it writes."""
        parts = values // self._part
        x, grad = self._random(parts), self._random(parts)
        out = torch.empty(parts * self._part, dtype=torch.bfloat16)

        def run(way: int) -> Tensor:
            self._call("silu_backward", way, self._terms, x, grad, out, parts * self._part)
            return out

        z = self._z(x, parts).requires_grad_()
        (slope,) = torch.autograd.grad((z * z.sigmoid()).sum(), z)
        return BarePass(run, self._ways, (grad[: out.numel()].double() * slope.flatten()))

    def _random(self, parts: int) -> Tensor:
        """Values, and behind them room for what is fetched ahead."""
        return torch.randn(parts * self._part + FETCHED_AHEAD).bfloat16()

    def _z(self, x: Tensor, parts: int) -> Tensor:
        """What x = -z * log2(e) stands for, a row for each part."""
        return -math.log(2) * x[: parts * self._part].double().view(parts, self._part)

    def _call(self, name: str, way: int, *arguments: Tensor | int) -> None:
        numbers = (value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
        function = getattr(self._library, name)
        function(*(ctypes.c_int64(number) for number in (way, *numbers, torch.get_num_threads())))
