"""The log is JSON, a row a line, whatever is measured and whenever a run is killed."""

import json
import resource
import signal

import pytest

from train.log import Log


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for step in (2, 4, 6):
        log.append({"step": step, "loss": 1.0, "step_ms": 10.0 * step})
    return log


def strict(line: str):
    return json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_rows_come_back(log):
    assert [row["step"] for row in log.rows()] == [2, 4, 6]


def test_seconds_are_those_of_all_steps(log):
    assert log.seconds() == pytest.approx(2 * (0.02 + 0.04 + 0.06))


def test_what_json_cannot_say_is_null(log):
    log.append({"step": 8, "loss": 0.5, "step_ms": 1.0, "psnr_db": {"a": float("inf"), "b": [float("nan"), 1.0]}})
    rows = [strict(line) for line in log.path.read_text().splitlines()]
    assert rows[-1]["psnr_db"] == {"a": None, "b": [None, 1.0]}


def test_rows_after_a_checkpoint_are_dropped(log):
    log.keep_until(4)
    assert [row["step"] for row in log.rows()] == [2, 4]
    log.keep_until(4)
    assert [row["step"] for row in log.rows()] == [2, 4]


def test_without_a_checkpoint_no_row_is_left(log):
    log.keep_until(0)
    assert log.rows() == []


@pytest.mark.parametrize("tail", ['{"step": 8, "lo', '{"step": 8}', "\x00\x00", '{"step": NaN}\n', "[1]\n", "\n"])
def test_a_row_that_was_cut_off_is_dropped(log, tail):
    with log.path.open("a") as file:
        file.write(tail)
    log.keep_until(100)
    assert [row["step"] for row in log.rows()] == [2, 4, 6]


def test_no_log_is_no_rows_to_drop(tmp_path):
    Log(tmp_path / "log.jsonl").keep_until(3)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_finds_the_disk_full_names_the_log(log):
    size = log.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            log.append({"step": 8, "loss": 1.0, "step_ms": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(log.path) in str(full.value)
    assert [row["step"] for row in log.rows()] == [2, 4, 6]


def test_a_row_that_a_full_disk_cuts_off_is_taken_back(log, monkeypatch):
    before = log.path.read_text()

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            return self.file.write(data[:5])

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = type(log.path).open
    monkeypatch.setattr(type(log.path), "open", lambda path, *mode, **more: Full(opened(path, *mode, **more)))
    with pytest.raises(OSError, match=r"log\.jsonl: only 5 of"):
        log.append({"step": 8, "loss": 1.0, "step_ms": 1.0})
    monkeypatch.undo()
    assert log.path.read_text() == before


def test_a_row_of_brackets_without_end_is_dropped(log):
    with log.path.open("a") as file:
        file.write("[" * 100_000 + "\n")
    log.keep_until(6)
    assert [row["step"] for row in log.rows()] == [2, 4, 6]
