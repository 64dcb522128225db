"""Runs `k5 encode` again and again, each time in a fork of this process, which has run it once.

Started with the shim of fault_shim.c loaded. Takes requests as lines of JSON: the arguments of `k5 encode`, the folder
whose files are watched, which call fails (0: none) and how. Answers with the exit code (negative: the signal that
ended it), the number of calls, the one that failed, and what was written to stderr.
"""

import ctypes
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from encoding_jobs import CountingEncoder, make_video

from k5kernels.cli import app
from k5kernels.latents import job
from k5kernels.vae import weights

COMMAND = typer.main.get_command(app)
SHIM = ctypes.CDLL(None)
SHIM.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
SHIM.fault_last.restype = ctypes.c_char_p


def run(request: dict[str, Any]) -> None:
    """In the fork: the command, with the n-th call failing. Never returns."""
    answer, stderr = Path(request["answer"]), os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    SHIM.fault_arm(os.fsencode(request["folder"]), request["call"], request["action"])
    code = 70
    try:
        COMMAND(request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"Traceback of {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    calls, last = SHIM.fault_calls(), SHIM.fault_last().decode(errors="replace")
    SHIM.fault_arm(b"", 0, 0)
    sys.stderr.flush()
    answer.write_text(json.dumps({"calls": calls, "last": last}))
    os._exit(code)


def warm_up() -> None:
    """A whole job in this process, so that no fork pays for what is imported and set up by the first one."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        videos = make_video(Path(folder) / "a.mp4", 1)
        arguments = ["encode", str(videos), "--vae", "none", "--out", f"{folder}/out", "--clip-frames", "1"]
        COMMAND(arguments, standalone_mode=False)


def main() -> None:
    torch.set_num_threads(1)
    encoder = CountingEncoder()
    weights.load_encoder = lambda path: encoder
    job.encode_videos = partial(job.encode_videos, samples_per_shard=2)
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        Path(request["answer"]).unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            run(request)
        _, status = os.waitpid(child, 0)
        answer = Path(request["answer"])
        told = json.loads(answer.read_text()) if answer.exists() else {"calls": 0, "last": ""}
        stderr = Path(request["stderr"]).read_text(errors="replace")
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "stderr": stderr} | told), flush=True)


if __name__ == "__main__":
    main()
