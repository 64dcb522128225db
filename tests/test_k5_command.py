"""`k5` as it is installed: it is the command, and may be stopped while it is still importing."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = "import k5_command; k5_command.main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_import_of_torch_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """A torch in whose place another stands, which never ends and takes every exception for its own."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError from None\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (128 + number, f"k5: stopped by {number.name}\n")


def test_it_is_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["k5"] == "k5_command:main"
    assert project["tool"]["setuptools"]["py-modules"] == ["k5_command"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    help_text = subprocess.run(
        [sys.executable, "-c", RUN, "--help"], env=environment, capture_output=True, text=True
    ).stdout
    assert "Usage: k5 [OPTIONS]" in help_text
