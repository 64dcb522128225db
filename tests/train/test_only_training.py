"""One training at a time writes to a folder; what a killed one leaves behind hinders nobody."""

import os
import signal
import time

import pytest

from k5kernels.lock import LockedError
from train.only_training import LOCK, only_training


@pytest.fixture
def living(tmp_path):
    """Number of a process that trains in the folder; it ends with the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with only_training(tmp_path / "run"):
            os.write(write, b"x")
            time.sleep(600)
        os._exit(0)
    try:
        assert os.read(read, 1) == b"x"
        yield child
    finally:
        for number in (read, write):
            os.close(number)
        end(child)


def end(process):
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_second_training_is_refused_while_the_first_lives_and_starts_when_it_was_killed(living, tmp_path):
    out = tmp_path / "run"
    words = f"{out}: is being written by process {living} on .*; wait for its end, or give another folder"
    with pytest.raises(LockedError, match=words), only_training(out):
        pass
    end(living)
    assert [path.name for path in out.iterdir()] == [LOCK]
    with only_training(out):
        pass
    assert list(out.iterdir()) == []
