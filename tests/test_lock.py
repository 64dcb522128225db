"""One writer at a time: who holds a lock, who has left one behind, and what the other is told."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from k5kernels import lock as module
from k5kernels.folder import Folder
from k5kernels.lock import Holder, Lock, LockedError, is_held, locked, read_holder, this_process

HOLD = """
import sys, time
from k5kernels.folder import Folder
from k5kernels.lock import locked, this_process
with locked(Folder(sys.argv[1]), "encode.lock", this_process("job", 1)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(module, "TRY_SECONDS", 0.01)


@pytest.fixture(params=["disk", "disk without locks", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    if request.param == "disk without locks":

        def flock(number: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    made = Folder(f"memory://test_lock{tmp_path}" if request.param == "object store" else tmp_path)
    made.create()
    return made


def leave(folder: Folder, **fields: object) -> Holder:
    """A lock file of a process that is no more, unless told otherwise."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    holder = replace(this_process("job", 1), pid=gone.pid, **fields)
    folder.write("encode.lock", json.dumps(asdict(holder)).encode())
    return holder


def test_the_file_tells_the_holder_and_goes_with_it(folder: Folder) -> None:
    with locked(folder, "encode.lock", this_process("job", 3)) as lock:
        assert read_holder(folder, "encode.lock") == lock.holder
        assert (lock.holder.pid, lock.holder.parts) == (os.getpid(), 3)
        lock.verify()
    assert folder.sizes() == {}


def test_the_file_goes_also_after_an_error(folder: Folder) -> None:
    with pytest.raises(KeyError), locked(folder, "encode.lock", this_process("job", 1)):
        raise KeyError
    assert folder.sizes() == {}


def test_a_second_holder_is_refused_in_one_clear_line(folder: Folder) -> None:
    with locked(folder, "encode.lock", this_process("job", 1)) as lock:
        words = rf"is being written by process {os.getpid()} on .*, since .*; wait for its end, or give another"
        with pytest.raises(LockedError, match=words), locked(folder, "encode.lock", this_process("job", 1)):
            pass
        lock.verify()
        with locked(folder, "0001-encode.lock", this_process("job", 1)):
            pass


def test_a_lock_that_a_dead_process_left_is_taken_over_at_once(folder: Folder) -> None:
    leave(folder)
    began = time.monotonic()
    with locked(folder, "encode.lock", this_process("job", 1)):
        assert time.monotonic() - began < 0.25


def test_a_process_of_another_machine_that_renews_its_lock_is_alive(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = leave(folder, boot="another", host="elsewhere")
    if folder.local is not None and (folder.local / "encode.lock").exists():
        folder.remove("encode.lock")
        folder.write("encode.lock", json.dumps(asdict(holder)).encode())
    read, reads = module.read_holder, []

    def renewed(folder: Folder, name: str) -> Holder | None:
        reads.append(name)
        found = read(folder, name)
        return None if found is None else replace(found, renewed=len(reads))

    monkeypatch.setattr(module, "read_holder", renewed)
    with pytest.raises(LockedError, match="on elsewhere"), locked(folder, "encode.lock", this_process("job", 1)):
        pass


def test_a_process_of_another_machine_that_does_not_is_not(folder: Folder) -> None:
    leave(folder, boot="another", host="elsewhere")
    began = time.monotonic()
    with locked(folder, "encode.lock", this_process("job", 1)):
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_lock_file_that_is_none_is_taken_over(folder: Folder, data: bytes) -> None:
    folder.write("encode.lock", data)
    with locked(folder, "encode.lock", this_process("job", 1)) as lock:
        lock.verify()


def test_a_lock_is_renewed(folder: Folder) -> None:
    with locked(folder, "encode.lock", this_process("job", 1)) as lock:
        end = time.monotonic() + 10
        while (found := read_holder(folder, "encode.lock")) is None or found.renewed < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        lock.verify()


@pytest.mark.parametrize(
    ("take", "words"),
    [
        (lambda lock: lock.folder.remove(lock.name), "encode.lock: was removed while its job ran"),
        (
            lambda lock: Lock(lock.folder, lock.name, None, this_process("other", 1)).write(),
            "is being written by process",
        ),
    ],
)
def test_a_lock_that_was_lost_is_noticed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, take: Callable[[Lock], None], words: str
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 60)
    with locked(folder, "encode.lock", this_process("job", 1)) as lock:
        mine = json.dumps(asdict(lock.holder)).encode()
        take(lock)
        with pytest.raises(LockedError, match=words):
            lock.verify()
        folder.write("encode.lock", mine)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_lets_go(tmp_path: Path, number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        words = f"is being written by process {process.pid} on"
        with pytest.raises(LockedError, match=words), locked(Folder(tmp_path), "encode.lock", this_process("job", 1)):
            pass
        holder = read_holder(Folder(tmp_path), "encode.lock")
        assert holder is not None
        assert is_held(Folder(tmp_path), "encode.lock", holder)
        process.send_signal(number)
        process.wait()
    assert not is_held(Folder(tmp_path), "encode.lock", holder)
    with locked(Folder(tmp_path), "encode.lock", this_process("job", 1)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_brackets_without_end_is_none(tmp_path):
    (tmp_path / "encode.lock").write_text("[" * 100_000)
    assert read_holder(Folder(tmp_path), "encode.lock") is None
