"""Where an encoding job is, for people: a bar on a terminal, lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from k5kernels.latents.job import EncodeSummary, Step
from k5kernels.terminal import printable

LOG_SECONDS = 60.0


@contextmanager
def display(terminal: Console) -> Iterator[Callable[[Step], None]]:
    """What to call with each step of a job: a bar where the console is a terminal, else a line a source or a minute."""
    if not terminal.is_terminal:
        yield Log(lambda line: terminal.print(line, soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=terminal, transient=True) as bars:
        yield _Bar(bars, bars.add_task("", total=None, pace=""))


def left_out(summary: EncodeSummary) -> list[str]:
    """A line for each file that was left out, and one for those that were by their names."""
    lines = [f"left out: {printable(why)}" for why in summary.left_out.values()]
    if summary.others:
        counts = ", ".join(f"{count} {suffix or 'of macOS'}" for suffix, count in sorted(summary.others.items()))
        lines.append(f"left out by their names: {printable(counts)}")
    return lines


class Pace:
    """How fast a job encodes, and how long the rest takes at that pace by the sizes of the sources."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._compared: bool | None = None
        self._began, self._number, self._clips, self._clips_before = 0.0, 0, 0, 0

    def update(self, step: Step) -> str:
        """The pace in words; empty where it is not known yet. Encoding and comparing each have their own."""
        if self._compared != step.compared:
            self._compared, self._began, self._number = step.compared, self._clock(), step.number
            self._clips, self._clips_before = 0, 0
        if step.number != self._number:
            self._number, self._clips_before = step.number, self._clips_before + self._clips
        self._clips = step.clips
        seconds, done = self._clock() - self._began, bytes_done(step)
        if seconds <= 0 or done <= 0:
            return ""
        left = f"{timedelta(seconds=round((step.bytes_all - done) * seconds / done))} left"
        if step.compared:
            return left
        clips = f"{(self._clips_before + self._clips) / seconds:.3g} clips/s"
        waited = f", waits {step.seconds.wait / step.seconds.run:.0%}" if step.seconds.run else ""
        return f"{clips}{waited}, {left}"


class Log:
    """A line when a source is done with, and once a minute in between."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._pace = write, clock, Pace(clock)
        self._last = clock()

    def __call__(self, step: Step) -> None:
        pace = self._pace.update(step)
        # Of the sources that are only compared, which may be many, a line a minute is enough.
        is_end = step.outcome is not None and (not step.compared or step.outcome != "")
        if not is_end and self._clock() - self._last < LOG_SECONDS:
            return
        self._last = self._clock()
        self._write(f"[{step.number}/{step.sources}] {_describe(step)}{pace and f' ({pace})'}")


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task, self._pace = bars, task, Pace()

    def __call__(self, step: Step) -> None:
        if step.outcome:
            self._bars.console.print(f"[{step.number}/{step.sources}] {_describe(step)}", soft_wrap=True)
        name = escape(printable(step.source.rsplit("/", 1)[-1]))
        self._bars.update(
            self._task,
            description=f"{step.number}/{step.sources} {'comparing ' if step.compared else ''}{name}",
            completed=bytes_done(step),
            total=step.bytes_all or None,
            pace=self._pace.update(step),
        )


def bytes_done(step: Step) -> float:
    """Of all sources, as far as is known also of the one that is being encoded."""
    begun = step.outcome is None and step.announced > 0
    return step.bytes_done + (step.bytes * min(step.frames / step.announced, 1.0) if begun else 0.0)


def _describe(step: Step) -> str:
    source = printable(step.source)
    if step.outcome:
        return printable(step.outcome)
    if step.compared:
        return f"{source}: compared with what was encoded"
    if step.outcome is None:
        return f"{source}: {step.frames} of {step.announced or 'an unknown number of'} frames"
    return f"{source}: {step.clips} clips"
