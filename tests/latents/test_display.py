"""What people see of a job: a line a source or a minute in a log, a bar on a terminal, and how long the rest takes."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from k5kernels.latents.display import Log, Pace, display, left_out
from k5kernels.latents.job import EncodeSummary, Step

FIRST = Step("videos/a.mp4", bytes=100, number=1, sources=2, bytes_done=0, bytes_all=400)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_pace_is_by_clips_and_the_rest_by_bytes(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.update(FIRST) == ""
    clock.now = 10
    assert pace.update(replace(FIRST, frames=50, announced=100, clips=2)) == "0.2 clips/s, 0:01:10 left"
    clock.now = 20
    assert pace.update(replace(FIRST, clips=4, bytes_done=100, outcome="")) == "0.2 clips/s, 0:01:00 left"
    second = replace(FIRST, source="videos/b.mp4", bytes=300, number=2, bytes_done=100)
    assert pace.update(second) == "0.2 clips/s, 0:01:00 left"
    clock.now = 40
    assert pace.update(replace(second, clips=6, bytes_done=400, outcome="")) == "0.25 clips/s, 0:00:00 left"
    assert pace.update(replace(FIRST, compared=True)) == ""


def test_log_has_a_line_a_source_and_one_a_minute(clock: Clock) -> None:
    lines: list[str] = []
    log = Log(lines.append, clock)
    log(FIRST)
    clock.now = 30
    log(replace(FIRST, frames=50, announced=100, clips=2))
    assert lines == []
    clock.now = 61
    log(replace(FIRST, frames=60, announced=100, clips=3))
    clock.now = 70
    log(replace(FIRST, clips=5, bytes_done=100, outcome=""))
    log(replace(FIRST, number=2, outcome="videos/b.mp4: expected a video", bytes_done=400))
    assert [line.split(" (")[0] for line in lines] == [
        "[1/2] videos/a.mp4: 60 of 100 frames",
        "[1/2] videos/a.mp4: 5 clips",
        "[2/2] videos/b.mp4: expected a video",
    ]


def test_log_says_of_sources_that_are_compared_only_what_failed(clock: Clock) -> None:
    lines: list[str] = []
    log = Log(lines.append, clock)
    log(replace(FIRST, compared=True, outcome=""))
    log(replace(FIRST, compared=True, outcome="videos/a.mp4: Permission denied"))
    clock.now = 61
    log(replace(FIRST, compared=True, outcome=""))
    assert [line.split(" (")[0] for line in lines] == [
        "[1/2] videos/a.mp4: Permission denied",
        "[1/2] videos/a.mp4: compared with what was encoded",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_any_name_is_one_line(terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, markup=False, highlight=False, width=200)
    step = replace(FIRST, source="caf\udce9\n[b]\x1b[2J.mp4", outcome="caf\udce9\n[b]\x1b[2J.mp4: expected a video")
    with display(console) as progress:
        progress(step)
    text = output.getvalue()
    text.encode("utf-8")
    assert "caf\\xe9 [b]\\x1b[2J.mp4: expected a video" in text
    assert "\x1b[2J" not in text


def test_what_was_left_out_is_listed() -> None:
    summary = EncodeSummary(left_out={"a": "a: a device, pipe or socket"}, others={".txt": 3, ".json": 1})
    assert left_out(summary) == ["left out: a: a device, pipe or socket", "left out by their names: 1 .json, 3 .txt"]
