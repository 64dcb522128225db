"""`bench.gpu` keeps its time and loses no rows, whatever a section does; committed results are what they say."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from bench.gpu.__main__ import main
from bench.gpu.page import PAGE, page
from bench.gpu.results import COMMITTED, Machine, Results, Row
from bench.gpu.runner import NOT_REACHED, Section, read_rows, run
from k5kernels.triton.attention_configurations import KERNELS, MEASURED

MACHINE = Machine("NVIDIA H100 80GB HBM3", "580.1", "2.11.0", "3.6.0", "abc", "2026-01-02")
ROW = Row("attention", "tiny", None, None, "k5", "ms", 1.5, 1.0, 2.0, 7)
WRITES = f"import sys; open(sys.argv[1], 'a').write({json.dumps(ROW.__dict__)!r} + chr(10)); "


def section(name, code, limit=60.0):
    return Section(name, limit, lambda path: [sys.executable, "-c", code, str(path)])


def run_all(sections, seconds=60.0):
    kept = []
    ends = run(sections, seconds, lambda rows, ends: kept.append((list(rows), dict(ends))), lambda text: None)
    return ends, kept


def test_a_section_that_crashes_costs_itself_alone_and_keeps_its_rows():
    fault = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    ends, kept = run_all([section("a", WRITES + fault), section("b", WRITES), section("c", "raise ValueError('no')")])
    assert ends == {"a": "failed with exit code -11", "b": "done", "c": "failed with exit code 1"}
    assert [len(rows) for rows, _ in kept] == [1, 2, 2, 2]
    assert kept[-1] == ([ROW, ROW], ends)


def test_a_section_that_hangs_is_stopped_with_the_processes_it_started(tmp_path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    ends, kept = run_all([section("hangs", WRITES + hangs, limit=3), section("next", WRITES)])
    assert ends == {"hangs": "stopped after 3 s", "next": "done"}
    assert len(kept[-1][0]) == 2
    assert beats.exists()
    size = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == size


def test_a_run_that_is_stopped_stops_its_section(tmp_path):
    beats = tmp_path / "beats"
    code = f"import os, signal, time\nopen({str(beats)!r}, 'a').write('.'); os.kill(os.getppid(), signal.SIGALRM)\n"
    code += f"while True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    before = signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(130))
    try:
        with pytest.raises(SystemExit, match="130"):
            run_all([section("stopped", code)])
    finally:
        signal.signal(signal.SIGALRM, before)
    size = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == size


def test_it_stops_in_time_and_says_what_it_did_not_reach():
    started = time.monotonic()
    ends, _ = run_all([section("long", "import time; time.sleep(600)"), section("late", WRITES)], seconds=2)
    assert ends["long"].startswith("stopped after 2 s")
    assert ends["late"] == NOT_REACHED
    assert time.monotonic() - started < 20


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps(ROW.__dict__)
    path.write_text(f"{whole}\n{whole[:20]}")
    assert read_rows(path) == [ROW]
    assert read_rows(tmp_path / "none") == []


def test_results_are_read_as_written_and_named_by_card_and_date(tmp_path):
    results = Results(MACHINE, [ROW, replace(ROW, mask="NABLA ∪ STA", density=0.1)], {"attention": "done"})
    path = results.write(tmp_path / "new")
    assert path.name == "h100-80gb-hbm3-2026-01-02.json"
    assert Results.read(path) == results


def test_a_failed_write_leaves_the_results_before_it(tmp_path):
    before = Results(MACHINE, [ROW], {})
    path = before.write(tmp_path)
    with pytest.raises(TypeError):
        Results(MACHINE, [replace(ROW, median=object())], {}).write(tmp_path)
    assert Results.read(path) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_file_is_one_run_on_one_card(path):
    results = Results.read(path)
    assert path.name == results.machine.file_name
    assert results.rows
    assert {row.section for row in results.rows} <= set(results.sections)
    assert all(
        (row.median is None or row.median > 0) and (row.density is None or 0 < row.density <= 1) for row in results.rows
    )


def test_what_attention_is_configured_with_on_sm_90_was_the_fastest_of_ours():
    results = Results.read(COMMITTED / "h200-2026-11-26.json")
    chosen = "4 warps, descriptors, no pairs"
    others = ("as shipped, with pairs of query blocks", "8 warps, pairs of query blocks")
    rates = {(row.sizes, row.mask, row.variant): row.median for row in results.rows if row.section == "attention"}
    measured = [key for key in rates if key[2] == chosen]
    assert len(measured) == 4
    assert all(rates[key] > rates[(*key[:2], other)] for key in measured for other in others)
    assert {generation for generation, _, _ in MEASURED} == {9}
    assert {(dim, kernel) for _, dim, kernel in MEASURED} == {(dim, kernel) for dim in (64, 128) for kernel in KERNELS}
    assert {(one.warps, one.stages, one.descriptors) for one in MEASURED.values()} == {(4, 2, True)}


def test_the_page_of_gpu_figures_is_that_of_the_committed_files():
    assert PAGE.read_text(encoding="utf-8") == page()


def gpu(*arguments):
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def gpu_here(monkeypatch):
    """`bench.gpu` in this process: what it gives back. path: the PATH meanwhile."""

    def run(*arguments, path=os.environ["PATH"]):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments])
        return main()

    return run


def sanitizer(folder, script):
    """A PATH on which compute-sanitizer is this shell script."""
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_without_the_sanitizer_it_says_what_to_install(tmp_path, gpu_here, capsys):
    (tmp_path / "bin").mkdir()
    assert gpu_here("--dry", "--sanitize", "--out", str(tmp_path / "out"), path=str(tmp_path / "bin")) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("not run: compute-sanitizer is not installed")


def test_the_sanitizer_runs_both_checks_and_what_it_finds_is_a_failure(tmp_path, gpu_here, capsys):
    log = tmp_path / "log"
    path = sanitizer(tmp_path, f"echo $PYTORCH_NO_CUDA_MEMORY_CACHING $@ >> {log}; [ $2 = memcheck ] || exit 9")
    assert gpu_here("--dry", "--sanitize", "--out", str(tmp_path / "out"), path=path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert {"memcheck: done", "racecheck: failed with exit code 9"} <= set(printed)
    calls = [line.split() for line in log.read_text().splitlines()]
    assert [call[:5] for call in calls] == [
        ["1", "--tool", check, "--error-exitcode", "9"] for check in ("memcheck", "racecheck")
    ]
    assert all(call[call.index("--section") + 1] == "small" for call in calls)


@pytest.mark.slow
def test_what_the_sanitizer_runs_ends_well(tmp_path, gpu_here, capsys):
    path = sanitizer(tmp_path, 'shift 4; exec "$@"')
    ended = gpu_here("--dry", "--sanitize", "--seconds", "600", "--out", str(tmp_path / "out"), path=path)
    assert ended == 0, capsys.readouterr().out


def test_a_section_runs_without_a_gpu_when_asked_to_be_tried(tmp_path):
    done = gpu("--dry", "--only", "attention", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    results = Results.read(path)
    assert results.sections == {"attention": "done"}
    assert {row.variant for row in results.rows} == {"k5", "dense"}
    assert {row.unit for row in results.rows} == {"ms", "TFLOP/s"}
    assert all(row.lower <= row.median <= row.upper and row.repetitions >= 5 for row in results.rows)


@pytest.mark.slow
def test_every_section_runs_without_a_gpu_when_asked_to_be_tried(tmp_path):
    assert gpu("--dry", "--out", str(tmp_path), "--seconds", "600").returncode == 0


def test_what_is_asked_for_is_checked(tmp_path, gpu_here, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_here("--dry", "--only", "attention,nothing", "--out", str(tmp_path))
    assert "got nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_torch_triton_and_numpy_are_enough():
    others = [
        "av",
        "fsspec",
        "hypothesis",
        "matplotlib",
        "pytest",
        "rich",
        "safetensors",
        "transformers",
        "typer",
        "webdataset",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({others!r})); import bench.gpu.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)
