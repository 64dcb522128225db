"""A job whose calls of the file system fail one by one: see fault_shim.c and fault_worker.py."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = shutil.which("cc")


@dataclass(frozen=True)
class Result:
    """code: exit code, or minus the signal. calls: of the file system, where the run ended by itself. last: what
    failed. stderr: what the command wrote there."""

    code: int
    calls: int
    last: str
    stderr: str

    @property
    def report(self) -> list[str]:
        """The lines of errors."""
        return [line for line in self.stderr.splitlines() if line.startswith("k5: ")]


class FaultyJobs:
    """`k5 encode` with clips of a frame, 2 a shard."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self.folder = process, folder

    @property
    def running(self) -> int:
        """Number of the process of the job that runs."""
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text())

    def run(self, videos: Path | str, out: Path | str, call: int = 0, action: int = 0, *options: str) -> Result:
        """call: number of the call that fails. action: its error number, or minus the signal that ends the process."""
        arguments = ["encode", str(videos), "--vae", "none", "--out", str(out), "--clip-frames", "1", *options]
        request = {
            "arguments": arguments,
            "folder": f"{self.folder}/",
            "call": call,
            "action": action,
            "answer": f"{self.folder}.answer",
            "stderr": f"{self.folder}.stderr",
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))


@contextmanager
def faulty_jobs(folder: Path) -> Iterator[FaultyJobs]:
    """Jobs of which the files below the folder are watched."""
    assert COMPILER is not None
    shim = folder.with_name("fault_shim.so")
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-w", "-o", str(shim), str(HERE / "fault_shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    root, tests = HERE.parents[1], HERE.parent
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": f"{root}{os.pathsep}{tests}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
    }
    with subprocess.Popen(
        [sys.executable, str(HERE / "fault_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield FaultyJobs(process, folder)
        assert process.stdin is not None
        process.stdin.close()
