"""Where a section of the benchmark runs, and how it measures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.inputs import SIZES, TINY, Size
from bench.gpu.results import Row
from bench.gpu.timing import interleaved, quartiles


@dataclass(frozen=True)
class Run:
    """Where a section runs, and where its rows go."""

    device: torch.device
    sizes: tuple[Size, ...]
    keep: Callable[[Row], None]

    def measure(
        self, section: str, size: Size, variants: Mapping[str, Callable[[], Any]], *,
        mask: str | None = None, density: float | None = None, work: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Time the variants in turn; a row in ms each, and one in TFLOP/s where its work is given."""
        for name, times in interleaved(variants).items():
            lower, median, upper = quartiles(times)
            about = (section, str(size), mask, density, name)
            self.keep(Row(*about, "ms", median, lower, upper, len(times)))
            if work:
                rate, high, low = (work[name] / ms / 1e9 for ms in (median, lower, upper))
                self.keep(Row(*about, "TFLOP/s", rate, low, high, len(times)))

    def absent(self, section: str, size: Size, variant: str, reason: str) -> None:
        """One row that says why a variant did not run."""
        self.keep(Row(section, str(size), None, None, variant, f"not run: {reason}", None))


def make_run(dry: bool, keep: Callable[[Row], None]) -> Run:
    """dry: tiny tokens on the CPU, to try the sections without a GPU."""
    return Run(torch.device("cpu"), TINY, keep) if dry else Run(torch.device("cuda"), SIZES, keep)
