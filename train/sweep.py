"""Steps of the trainer, measured on this machine: one subprocess a point.

    python -m train.sweep --csv steps.csv

Writes the CSV that `k5 plan calibrate --steps` takes; `k5 plan calibrate --sweep` runs this command.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from k5_command import stop_in_one_line
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import LATENT_CHANNELS, Sample, ShardWriter
from k5kernels.planner.calibration import MeasuredStep, write_steps
from k5kernels.planner.shapes import PATCH
from k5kernels.terminal import console, one_line_errors

ROOT = Path(__file__).parents[1]  # where the trainer is a module
SIDE = 16  # tokens along the height and the width of a frame: four blocks of NABLA
WIDTHS = (128, 192, 256)
FRAMES = (4, 6, 8, 10)
NABLA_THRESHOLDS = (None, 0.3)
BLOCKS_AND_BATCH = ((2, 1), (4, 1), (2, 2), (3, 1), (1, 2))
STEPS = 4  # of a point; the first is not counted


@dataclass(frozen=True)
class Point:
    """A run of the trainer: width, latent frames of SIDE × SIDE tokens, blocks, clips of a step, NABLA's threshold."""

    model_dim: int
    frames: int
    blocks: int
    batch: int
    nabla_thr: float | None

    @property
    def tokens(self) -> int:
        """Visual tokens of a clip."""
        return self.frames * SIDE**2


@dataclass(frozen=True)
class PointResult:
    """What a run measured, and the trainer's own predictions.

    peak_bytes: resident memory of the process at most. base_bytes: before there was a model. predicted_bytes: the peak
    by the formula, from the base on.
    """

    step: MeasuredStep
    peak_bytes: int
    base_bytes: int
    predicted_bytes: int


def points() -> list[Point]:
    """24 runs: widths × frames × dense and NABLA, cycling through depths and batches."""
    rest = cycle(BLOCKS_AND_BATCH)
    return [Point(d, t, *next(rest), thr) for d, t, thr in product(WIDTHS, FRAMES, NABLA_THRESHOLDS)]


def sweep(chosen: list[Point], done: Callable[[PointResult], None] = lambda result: None) -> list[PointResult]:
    """Run every point; `done` is called after each.

    Raises ValueError with the trainer's last words where it fails.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, point in enumerate(chosen):
            results.append(_measure(point, Path(folder) / str(number)))
            done(results[-1])
    return results


def _measure(point: Point, folder: Path) -> PointResult:
    folder.mkdir()
    _write_latent(point.frames, folder / "00000.tar")
    command = [sys.executable, "-m", "train.run", "--latents", folder, "--out", folder / "out", "--every", "1"]
    command += ["--no-captions"]
    command += ["--device", "cpu"]  # whose name and memory the profile has
    command += ["--steps", STEPS, "--model-dim", point.model_dim, "--blocks", point.blocks, "--batch", point.batch]
    if point.nabla_thr is not None:
        # The window would keep every block of so small a clip.
        command += ["--nabla-thr", point.nabla_thr, "--no-nabla-window"]
    ran = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"the trainer failed at {point}: {ran.stderr.strip()[-500:]}")
    rows = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    step_ms = statistics.median(row["step_ms"] for row in rows[1:])
    sizes = (point.model_dim, point.tokens, point.blocks, point.batch)
    return PointResult(
        MeasuredStep(*sizes, rows[-1]["density"], step_ms),
        peak_bytes=max(row["peak_bytes"] for row in rows),
        base_bytes=rows[0]["base_bytes"],
        predicted_bytes=rows[0]["predicted_bytes"],
    )


def _write_latent(frames: int, path: Path) -> None:
    """A shard of one clip of noise."""
    side = SIDE * PATCH
    latent = torch.randn(LATENT_CHANNELS, frames, side, side, generator=torch.Generator().manual_seed(0)).half()
    record = ClipRecord(4 * frames - 3, 8 * side, 8 * side, Fraction(24), "noise", first_frame=0)
    with ShardWriter(path) as shard:
        shard.write(Sample("noise", latent, record))


@one_line_errors("train.sweep")
def main(csv: Annotated[Path, typer.Option(help="file for the measured steps")]) -> None:
    """Measure 24 runs of the trainer: a few minutes."""
    terminal, chosen = console(stderr=True), points()
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        bar = bars.add_task("measuring", total=len(chosen))
        results = sweep(chosen, lambda result: bars.advance(bar))
    write_steps(csv, [result.step for result in results])


if __name__ == "__main__":
    stop_in_one_line("train.sweep")
    typer.run(main)
