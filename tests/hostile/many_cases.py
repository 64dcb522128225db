"""Runs many cases in processes of their own, so that a crash, a hang or too much memory is seen, and is one case's."""

import io
import multiprocessing
import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from math import ceil
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import process_time

import torch
import typer
from memory_folder import memory_folder

from k5kernels.terminal import one_line_errors

PROCESSES = 2
SECONDS = 10  # of the processor: a case that takes longer hangs, also on a machine that has other work
WAITING_SECONDS = 60  # by the clock, for a case that waits for something
MEMORY = 2 << 30  # bytes of address space that a case may take beyond what its process has at the start
LONGEST_LINE = 1000  # characters of an error
FAULT = 1500  # characters shown of what a fault raised

# Does case number n in a folder of its process: returns in a word or two what came of it, raises what must not be.
Check = Callable[[int, Path], str]

# Imports once what every process needs, and forks the processes from there.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "k5kernels.latents.job", "k5kernels.planner", "model.weights", "train.run"])


@dataclass(frozen=True)
class Outcome:
    """What came of a case: the check's own words, or a fault ("crash", "hang", "memory", "exception") and its text."""

    case: int
    words: str
    fault: str = ""


def tally(title: str, check: Check, cases: range) -> Counter[str]:
    """Run the cases, print how often each outcome came, and fail on the first faults.

    check: it is pickled, and runs in other processes.
    """
    with memory_folder() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        shares = [(cases[start::PROCESSES], folder / str(start)) for start in range(PROCESSES)]
        found = list(pool.map(lambda share: list(_run_share(check, *share)), shares))
    outcomes = sorted((outcome for share in found for outcome in share), key=lambda outcome: outcome.case)
    counts = Counter(outcome.words for outcome in outcomes)
    print(
        f"\n{title}: {len(outcomes)} tried, " + ", ".join(f"{count} {words}" for words, count in counts.most_common())
    )
    faults = [f"case {one.case}: {one.words}: {one.fault[-FAULT:]}" for one in outcomes if one.fault]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:5])
    return counts


def refusal(read: Callable[[], object], name: str) -> str | None:
    """The line that a command prints where `read` raises an error of the user's; None where it raises none.

    Any other exception leaves. Raises AssertionError where the line is long or does not name the file.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), one_line_errors():
            read()
    except typer.Exit:
        line = printed.getvalue()
        assert line.endswith("\n"), line[:LONGEST_LINE]
        assert line.count("\n") == 1, line[:LONGEST_LINE]
        assert len(line) <= LONGEST_LINE, line[:LONGEST_LINE]
        assert name in line, line[:LONGEST_LINE]
        return line
    return None


def _run_share(check: Check, cases: range, folder: Path) -> Iterator[Outcome]:
    folder.mkdir()
    process = connection = None
    for case in cases:
        if process is None or connection is None:
            connection, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, check, folder), daemon=True)
            process.start()
            theirs.close()
            connection.recv()  # it has imported what the check needs
        connection.send(case)
        outcome = _await(connection, process, case)
        yield outcome
        if outcome.words in ("crash", "hang", "memory"):
            process.kill()
            process.join()
            process = None
    if process is not None and connection is not None:
        connection.send(None)
        process.join()


def _await(connection: Connection, process: BaseProcess, case: int) -> Outcome:
    if not connection.poll(WAITING_SECONDS):
        return Outcome(case, "hang", f"no answer within {WAITING_SECONDS} s")
    try:
        return connection.recv()
    except EOFError:
        process.join()
    if process.exitcode == -signal.SIGXCPU:
        return Outcome(case, "hang", f"no answer within {SECONDS} s of the processor")
    return Outcome(case, "crash", f"the process ended with {process.exitcode}")


def _serve(connection: Connection, check: Check, folder: Path) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg complains of every damaged packet
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while (case := connection.recv()) is not None:
        connection.send(_run(check, case, folder))


def _run(check: Check, case: int, folder: Path) -> Outcome:
    # The system counts the process's seconds, and ends it by SIGXCPU.
    resource.setrlimit(resource.RLIMIT_CPU, (ceil(process_time()) + SECONDS, resource.RLIM_INFINITY))
    try:
        return Outcome(case, check(case, folder))
    except MemoryError:
        return Outcome(case, "memory", traceback.format_exc())
    except BaseException:
        return Outcome(case, "exception", traceback.format_exc())
