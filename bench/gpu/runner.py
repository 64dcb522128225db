"""Runs sections one after another, each in a process of its own, within a number of seconds.

A section that crashes, hangs or runs out of time costs itself alone; the rows that it had written are kept.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.results import Row

NOT_REACHED = "not reached: no time was left"
LAST_LINES = 15  # of a section that failed
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Section:
    """command: writes rows, one JSON object a line, to the path it is given, and exits with 0. limit: seconds."""

    name: str
    limit: float
    command: Callable[[Path], list[str]]


def run(
    sections: Sequence[Section],
    seconds: float,
    keep: Callable[[list[Row], dict[str, str]], object],
    say: Callable[[str], object] = print,
) -> dict[str, str]:
    """How each section ended: "done", or what went wrong in words.

    seconds: for all of them. keep: called after each section with all rows and ends so far.
    """
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    ends: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, section in enumerate(sections):
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                ends[section.name] = NOT_REACHED
                continue
            path = Path(folder) / f"{number}.jsonl"
            started = time.monotonic()
            ends[section.name], output = run_one(section.command(path), min(section.limit, left))
            rows += read_rows(path)
            say(f"{section.name}: {ends[section.name]} ({time.monotonic() - started:.1f} s)")
            if ends[section.name] != "done":
                say("\n".join(output.splitlines()[-LAST_LINES:]))
            keep(rows, ends)
    keep(rows, ends)
    return ends


def run_one(command: list[str], limit: float) -> tuple[str, str]:
    """How a process ended, and its output. It is killed with its children after `limit` seconds."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            end = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit:.0f} s"
        finally:  # also where this process is stopped
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            end += ", and it does not die"  # a process that waits in the driver
        output.seek(0)
        return end, output.read()


def read_rows(path: Path) -> list[Row]:
    """The rows of a section; a last line that was cut off where the process was killed is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [Row(**json.loads(line)) for line in lines]
