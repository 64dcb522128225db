"""`k5` as it is installed, and every other program here: it may be stopped at any time, and says so in one line."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = "import k5_command; k5_command.main()"
MAIN = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
AT_ONCE = ("bench.gpu.page",)  # ends before anybody could stop it
# Leaves a file behind where it is ended without an exception.
STOPPED = """
import pathlib, sys, time
import k5_command
k5_command.stop_in_one_line("a program")
try:
    print("running", flush=True)
    time.sleep(60)
finally:
    pathlib.Path(sys.argv[1]).write_text("closed")
"""


def programs() -> dict[str, Path]:
    """What `python -m` runs, by name, and its file."""
    files = [file for folder in ("bench", "model", "train") for file in sorted((ROOT / folder).rglob("*.py"))]
    runs = [file for file in files if MAIN.search(file.read_text())] + [ROOT / "k5kernels" / "__main__.py"]
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in runs}
    return {".".join(name[:-1] if name[-1] == "__main__" else name): file for file, name in parts.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a torch whose import never ends and takes every exception for its own. Written once: a program that starts
    while the file is written anew would find it empty.
    """
    (tmp_path / "torch.py").write_text(
        "import time\nprint('running', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError from None\n"
    )
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """With the folder's torch in the place of the installed one."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """(exit code, what it wrote to stderr)."""
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    return process.returncode, printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_import_of_torch_is_one_line(folder: Path, number: signal.Signals) -> None:
    with start(folder, "-c", RUN) as process:
        assert stop(process, number) == (128 + number, f"k5: stopped by {number.name}\n")


SOME = ("k5kernels", "bench.gpu", "model.diffusers_folder", "train.run")


@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(programs()), marks=pytest.mark.slow)], ids=["some", "all"])
def test_it_is_so_of_every_program(folder: Path, names: tuple[str, ...]) -> None:
    assert set(SOME) <= set(names) <= set(programs())
    running = {name: start(folder, "-m", name) for name in names if name not in AT_ONCE}
    try:
        ends = {name: stop(process, signal.SIGINT) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    packages = {name: name.split(".")[0].replace("k5kernels", "k5") for name in running}
    assert ends == {name: (130, f"{packages[name]}: stopped by SIGINT\n") for name in running}


@pytest.mark.parametrize("name", [name for name in programs() if name != "k5kernels"])
def test_every_program_sees_to_what_stops_it_later(name: str) -> None:
    """`k5` does so for all its commands."""
    text = programs()[name].read_text()
    assert name in AT_ONCE or "stop_in_one_line(" in text or "one_line_stop(" in text


def test_what_is_open_is_closed(folder: Path) -> None:
    with start(folder, "-c", STOPPED, str(folder / "left")) as process:
        assert stop(process, signal.SIGINT) == (130, "a program: stopped by SIGINT\n")
    assert (folder / "left").read_text() == "closed"


def test_it_is_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["k5"] == "k5_command:main"
    assert project["tool"]["setuptools"]["py-modules"] == ["k5_command"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    help_text = subprocess.run(
        [sys.executable, "-c", RUN, "--help"], env=environment, capture_output=True, text=True
    ).stdout
    assert "Usage: k5 [OPTIONS]" in help_text
