"""`python -m bench.gpu --out DIR [--seconds 240] [--only attention,mask] [--sanitize] [--dry]`: check and time a GPU.

Writes DIR/<card>-<date>.json after every section, and says what it did not reach. Exits with 1 where a section failed.
"""

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from bench.gpu import correctness, hopper, sanitizer
from bench.gpu.results import Machine, Results, Row
from bench.gpu.run import make_run
from bench.gpu.runner import Section, run
from bench.gpu.sections import SECTIONS
from k5_command import stop_in_one_line
from k5kernels.ops.hopper_attention import HEAD_DIMS, HOPPER

SMALL, SMALL_HOPPER = "small", "small hopper"  # what compute-sanitizer runs


def main() -> int:
    """0 where every section that was asked for ended well."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=240, help="for all sections (default 240)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas: " + ", ".join(SECTIONS))
    parser.add_argument(
        "--sanitize", action="store_true", help="nothing but small sizes under compute-sanitizer: memcheck, racecheck"
    )
    parser.add_argument("--dry", action="store_true", help="tiny inputs on the CPU: tries the sections without a GPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # with --rows: one section, in this process
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --dry tries the sections on the CPU")
    if arguments.section:
        one_section(arguments.section, arguments.rows, arguments.dry)
        return 0
    wanted = arguments.only.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"--only: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if arguments.out is None:
        parser.error("--out: expected a folder for the results")
    machine = this_machine(arguments.dry)

    def keep(rows: list[Row], ends: dict[str, str]) -> None:
        Results(machine, rows, ends).write(arguments.out)

    if arguments.sanitize:
        commands = {"": partial(_command, SMALL, arguments.dry)}
        if not arguments.dry and torch.cuda.get_device_capability() == HOPPER:
            commands[" of the kernels for Hopper"] = partial(_command, SMALL_HOPPER, False)
        sections = sanitizer.sections(commands)
        if not sections:
            print(sanitizer.MISSING)
            return 1
    else:
        sections = [
            Section(name, limit, partial(_command, name, arguments.dry))
            for name, (_, limit) in SECTIONS.items()
            if name in wanted
        ]
    ends = run(sections, arguments.seconds, keep, partial(print, flush=True))
    for name, end in ends.items():
        print(f"{name}: {end}")
    print(arguments.out / machine.file_name)
    return 0 if set(ends.values()) == {"done"} else 1


def one_section(name: str, rows: Path, dry: bool) -> None:
    """Run a section here; each of its rows is in the file as soon as it is there."""
    with rows.open("a", encoding="utf-8") as file:

        def keep(row: Row) -> None:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            file.flush()

        one = make_run(dry, keep)
        if name == SMALL:
            correctness.check_small(one.device)
        elif name == SMALL_HOPPER:
            for head_dim in HEAD_DIMS:
                for pairs in (False, True):
                    hopper.check(one.device, head_dim, pairs)
        else:
            SECTIONS[name][0](one)


def this_machine(dry: bool) -> Machine:
    """The card without a context on it: the sections' processes have theirs."""
    card, driver = "none (dry run)", None
    if not dry:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
        card, driver = _said(query).split(", ") if _said(query) else (torch.cuda.get_device_name(), None)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    commit = _said(["git", "rev-parse", "--short", "HEAD"]) or None
    return Machine(card, driver, torch.__version__, triton, commit, datetime.date.today().isoformat())


def _command(name: str, dry: bool, rows: Path) -> list[str]:
    own = [sys.executable, "-m", "bench.gpu", "--section", name, "--rows", str(rows)]
    return own + ["--dry"] * dry


def _said(command: list[str]) -> str:
    """The first line of what a command prints; empty where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    stop_in_one_line("bench.gpu")
    sys.exit(main())
