"""What a row of the log has beside the loss and the time of a step: where the time went, and how much work was done."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from k5kernels.block_mask import BlockMask
from k5kernels.device import synchronize
from k5kernels.planner import ModelShape
from train.crossdit_stage import CrossDiTStage
from train.parallel import Parallel
from train.resident import peak_bytes

SIDE, REPEATS = 1024, 5  # of the products that the peak is measured by
BACKWARD = 3  # forward and backward, in forwards


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the fastest of a few."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


def step_operations(shape: ModelShape, samples: int, tokens: int, density: float) -> float:
    """Floating-point operations of a step on so many samples of so many tokens: the products of the blocks, forward and
    backward, without what checkpointing computes again. density: of attention.
    """
    d, L = shape.model_dim, shape.blocks
    products = 2 * tokens * (8 * d**2 + 2 * shape.ff_dim * d)
    attention = 4 * density * tokens**2 * d
    return BACKWARD * samples * L * (products + attention)


@dataclass
class Measuring:
    """Called for every row, with what it has so far: what happened since the row before. peak: operations a second of
    all processes' devices. prediction: goes into every row as it is.
    """

    stage: CrossDiTStage
    parallel: Parallel
    peak: float
    prediction: Mapping[str, Any]
    clock: Callable[[], float] = time.perf_counter
    densities: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def mask(self, mask: BlockMask) -> None:
        """Take note of a NABLA mask."""
        self.densities.append(mask.density)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        density = self.parallel.mean(torch.tensor(fmean(self.densities or [1.0]))).item()
        self.densities.clear()
        work = self.stage.take_work()
        now = self.clock()
        seconds, self._since = now - self._since, now
        shape = ModelShape.of(self.stage.model.config)
        operations = sum(step_operations(shape, samples, tokens, density) for samples, tokens in work.batches)
        data_ms, communication_ms = work.data_seconds * 1e3 / max(1, len(work.batches)), row["communication_ms"]
        return {
            "data_ms": round(data_ms, 2),
            "compute_ms": None if communication_ms is None else round(row["step_ms"] - data_ms - communication_ms, 2),
            "tokens_per_s": round(sum(samples * tokens for samples, tokens in work.batches) / seconds, 1),
            "mfu": round(operations / seconds / self.peak, 4),
            "peak_bytes": peak_bytes(self.stage.device),
            "density": round(density, 4),
            **self.prediction,
        }
