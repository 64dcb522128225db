"""What a training shows while it runs: a line that moves on a terminal, elsewhere a line on stdout for every row."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from k5kernels.terminal import console

GIB = 2**30
MINUTE, HOUR = 60, 3600
PARTS = ("data", "compute", "communication", "checkpoint")  # of a step's time


class ProgressLine:
    """Steps of a training, of which `done` are done. shown: whether anything is."""

    def __init__(self, steps: int, done: int, shown: bool = True) -> None:
        self._console = console(stderr=True)
        self._steps, self._shown = steps, shown
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int) -> None:
        """So many steps are done."""
        self._bar.update(self._task, completed=done)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show what a row of the log says."""
        if not self._shown:
            return
        if self._console.is_terminal:
            self._bar.update(self._task, description=row_in_words(row))
        else:
            console().print(f"step {row['step']} of {self._steps}: {row_in_words(row, self._steps)}", soft_wrap=True)


def row_in_words(row: Mapping[str, Any], steps: int | None = None) -> str:
    """Loss, time of a step beside the predicted one and its parts, tokens a second, MFU and memory of a row, as far as
    it has them.

    steps: of the training, for the time that is left at this row's pace; None leaves it out.
    """
    loss = row.get("loss")
    words = ["no step was taken" if loss is None else f"loss {loss:.4f}", f"{row['step_ms']:,.0f} ms a step"]
    if "predicted_ms" in row:
        words[-1] += f" (predicted {row['predicted_ms']:,.0f} on {row['hardware']})"
    if row.get("compute_ms") is not None:
        words.append(" + ".join(f"{part} {row[f'{part}_ms']:,.0f}" for part in PARTS))
    if "tokens_per_s" in row:
        words.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if "mfu" in row:
        words.append(f"MFU {row['mfu']:.0%}")
    if "peak_bytes" in row:
        words.append(f"{row['peak_bytes'] / GIB:.2f} GiB")
    if steps is not None:
        words.append(f"{time_in_words((steps - row['step']) * row['step_ms'] / 1e3)} left")
    return ", ".join(words)


def time_in_words(seconds: float) -> str:
    """As hours, minutes or seconds."""
    if seconds >= HOUR:
        return f"{seconds / HOUR:.1f} h"
    return f"{seconds / MINUTE:.0f} min" if seconds >= MINUTE else f"{seconds:.0f} s"
