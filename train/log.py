"""The log of a training: log.jsonl, one row of JSON every so many steps."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from k5kernels.atomic import replacing


class Log:
    """Rows on disk; each has at least `step`, `loss` and `step_ms` (mean of the steps since the row before)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, whole or not at all. JSON has no word for NaN and infinity: they are written as null."""
        line = (json.dumps(finite(row), allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if written != len(line):
                file.truncate(size)
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written; is the disk full?")

    def keep_until(self, done: int) -> None:
        """Drop the rows after step number `done`, which a resumed run writes again, and rows that are not whole."""
        if not self.path.exists():
            return
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if (row := _row(line)) is not None and row["step"] <= done]
        if kept != lines:
            with replacing(self.path) as partial:
                partial.write_text("".join(kept))

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in order."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def seconds(self) -> float:
        """Time of all steps, without checkpoints and what was measured between them."""
        steps = [{"step": 0}, *self.rows()]
        return sum((row["step"] - before["step"]) * row["step_ms"] / 1e3 for before, row in pairwise(steps))


@dataclass
class Interval:
    """The steps since the last row. losses: of those that were taken. left_out: the samples of each that was not.
    communication: the share of collectives in a step, None where it is not known."""

    losses: list[float] = field(default_factory=list)
    left_out: list[Sequence[str]] = field(default_factory=list)
    step_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    communication: float | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time in the block is that of steps."""
        began = time.perf_counter()
        yield
        self.step_seconds += time.perf_counter() - began

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Time in the block is that for which a checkpoint holds training up."""
        began = time.perf_counter()
        yield
        self.checkpoint_seconds += time.perf_counter() - began

    def row(self, step: int) -> dict[str, Any]:
        """The row after this step; `left_out` and the samples are in it where a step was."""
        steps = len(self.losses) + len(self.left_out)
        step_ms = self.step_seconds * 1e3 / steps
        row: dict[str, Any] = {
            "step": step,
            "loss": round(fmean(self.losses), 5) if self.losses else None,
            "step_ms": round(step_ms, 1),
            "communication_ms": None if self.communication is None else round(self.communication * step_ms, 2),
            "checkpoint_ms": round(self.checkpoint_seconds * 1e3 / steps, 2),
        }
        if self.left_out:
            samples = sorted({sample for samples in self.left_out for sample in samples})
            row |= {"left_out": len(self.left_out), "left_out_samples": samples}
        return row


def _row(line: str) -> dict[str, Any] | None:
    """The row of a line, None where a kill or a full disk has cut it off."""
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    whole = line.endswith("\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def finite(value: Any) -> Any:
    """The same JSON value with null for every infinity and NaN in it."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
