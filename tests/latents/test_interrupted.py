"""A job that is stopped or failed at any call of the file system, and is then run again.

The job: a folder of a finished job, to which videos were added whose names sort before and after the others. Whatever
stops a run, whole shards are only ever added; the end is byte for byte that of an undisturbed run.
"""

import errno
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from encoding_jobs import contents, make_video, shards
from faults import COMPILER, FaultyJobs, Result, faulty_jobs
from memory_folder import memory_folder

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, for the shim that makes calls fail")

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE)
# Errors after which every source would fail: the run ends, and the next one ends as if it had not been.
ENDING = (errno.ENOSPC, errno.EMFILE)


class Case:
    """A started job in a folder of its own, and what it leaves when nothing disturbs it."""

    def __init__(self, jobs: FaultyJobs) -> None:
        self.jobs, self.videos, self.out = jobs, jobs.folder / "videos", jobs.folder / "out"
        self.begun, expected = jobs.folder.with_name("begun"), jobs.folder / "expected"
        make_video(self.videos / "m.mp4", 3, 1)
        assert jobs.run(self.videos, expected).code == 0
        shutil.copytree(expected, self.begun)
        make_video(self.videos / "a.mp4", 2, 2)
        make_video(self.videos / "more" / "z.mp4", 1, 3)
        self.calls = jobs.run(self.videos, expected).calls
        self.expected = contents(expected)
        self.samples = latents(expected)
        assert len(self.samples) == 3 + 2 + 1

    def begin(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.begun, self.out)

    def run(self, call: int = 0, action: int = 0) -> Result:
        """One run, after which the shards that were there still are."""
        before = whole_shards(self.out)
        result = self.jobs.run(self.videos, self.out, call, action)
        after = whole_shards(self.out)
        assert all(after.get(name) == data for name, data in before.items()), (result, sorted(after))
        assert "Traceback" not in result.stderr, result
        return result


def whole_shards(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith(".tar")}


def latents(out: Path) -> dict[str, bytes]:
    return {sample.key: sample.latent.numpy().tobytes() for shard in shards(out) for sample in shard}


@contextmanager
def new_case() -> Iterator[Case]:
    """One with a process of its own, which takes seconds to start."""
    with memory_folder() as root:
        (root / "watched").mkdir()
        with faulty_jobs(root / "watched") as jobs:
            yield Case(jobs)


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with new_case() as made:
        yield made


@pytest.fixture(scope="module")
def cases(case: Case) -> Iterator[list[Case]]:
    """Two of the same, for the long tests."""
    with new_case() as another:
        yield [case, another]


def at_every_call(cases: list[Case], check: Callable[[Case, int], None]) -> None:
    """Check each call of the job once, the cases sharing them side by side."""

    def share(number: int) -> None:
        for call in range(1 + number, cases[number].calls + 1, len(cases)):
            check(cases[number], call)

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(share, range(len(cases))))


def check_stopped(case: Case, stops: list[tuple[int, int]]) -> None:
    """Runs that are stopped at these calls by these signals, one after the other, and one that is not."""
    case.begin()
    for call, number in stops:
        result = case.run(call, -number)
        if number != signal.SIGKILL and result.code != 0:
            assert result.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)], result
            # The first call looks at the argument, before the job has begun: there is nothing to tell of yet.
            assert len(result.report) == 1 or result.calls == 1, result
    assert case.run().code == 0, stops
    assert contents(case.out) == case.expected, stops


def random_stops(case: Case, seed: int) -> list[tuple[int, int]]:
    """One to three stops; half of them early, before a first new shard can be there."""
    draw = random.Random(seed)
    last = [case.calls, case.calls // 3][seed % 2]
    return [(draw.randint(1, last), draw.choice(SIGNALS)) for _ in range(1 + seed % 3)]


def check_fault(case: Case, call: int, number: int) -> None:
    """A run in which one call fails, and one in which none does."""
    case.begin()
    result = case.run(call, number)
    if result.code == 0:
        # A call whose failure costs nothing.
        assert contents(case.out) == case.expected, result
        return
    assert result.code in (1, 2), result
    assert result.report, result
    assert all(str(case.jobs.folder) in line for line in result.report), result
    again = case.run()
    assert again.code == 0, (result, again)
    assert latents(case.out) == case.samples, result
    assert sorted(path.suffix for path in case.out.iterdir() if path.suffix != ".tar") == [".json"], result
    if number in ENDING:
        assert contents(case.out) == case.expected, result


@pytest.mark.parametrize("seed", range(4))
def test_stopped_runs_only_add_and_end_as_an_undisturbed_one(case: Case, seed: int) -> None:
    check_stopped(case, random_stops(case, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 64))
def test_many_stopped_runs_only_add_and_end_as_an_undisturbed_one(case: Case, seed: int) -> None:
    check_stopped(case, random_stops(case, seed))


@pytest.mark.slow
def test_a_run_may_be_killed_at_every_call(cases: list[Case]) -> None:
    at_every_call(cases, lambda case, call: check_stopped(case, [(call, signal.SIGKILL)]))


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_failing_call_loses_nothing_and_is_told(case: Case, number: int) -> None:
    start = 1 + ERRORS.index(number) * 7
    for call in range(start, case.calls + 1, 61):
        check_fault(case, call, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_every_failing_call_loses_nothing_and_is_told(cases: list[Case], number: int) -> None:
    at_every_call(cases, lambda case, call: check_fault(case, call, number))
