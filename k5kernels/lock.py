"""One writer to a folder at a time: a lock file says who writes, and a dead writer leaves it behind without harm.

On a local or network disk the operating system holds the lock (`flock`) and lets go of it when the process ends,
however it ends. Where it cannot (object stores, some network disks), and where the writer was on another machine, a
lock counts as held as long as its writer renews it.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from k5kernels.folder import Folder, naming

RENEW_SECONDS = 10.0
# How long a lock of another machine is watched before it counts as left behind.
WATCH_SECONDS = 3 * RENEW_SECONDS
# How long two that write one lock object at the same moment wait, to see which of them was the last.
SETTLE_SECONDS = 0.5
TRIES = 5
TRY_SECONDS = 0.1
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
BYTES = 1024


class LockedError(ValueError):
    """Another process writes to the folder; the message says which, and what can be done."""


@dataclass(frozen=True)
class Holder:
    """Who writes, and what.

    boot: names a run of an operating system. pid, born: the process, and when it began in the system's own count, as
    numbers of processes come back. started: when the job began, for people to read. job: tells it from other jobs.
    parts: among how many processes it is shared. token: of this holder alone. renewed: how often.
    """

    host: str
    boot: str
    pid: int
    born: str
    started: str
    job: str
    parts: int
    token: str
    renewed: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"

    @property
    def is_of_this_system(self) -> bool:
        return self.boot == _boot()

    @property
    def is_running_here(self) -> bool:
        """Whether the process is there, asked of a holder on this host. Containers have hosts and processes apart."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _born(self.pid) == self.born


def this_process(job: str, parts: int) -> Holder:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    pid = os.getpid()
    return Holder(socket.gethostname(), _boot(), pid, _born(pid), started, job, parts, secrets.token_hex(8))


class Lock:
    """A lock that is held: the file, and who holds it."""

    def __init__(self, folder: Folder, name: str, number: int | None, holder: Holder) -> None:
        """number: of the open file that has the operating system's lock, None where there is none."""
        self.folder, self.name, self.number, self.holder = folder, name, number, holder

    def verify(self) -> None:
        """Raises LockedError where another process has taken the lock, as happens to one that slept for long."""
        for _ in range(TRIES):
            found = read_holder(self.folder, self.name)
            if found is not None and found.token == self.holder.token:
                return
            # It may be read while it is being renewed.
            time.sleep(TRY_SECONDS)
        raise (
            _refused(self.folder, found)
            if found
            else LockedError(f"{self.folder.path(self.name)}: was removed while its job ran; run the command again")
        )

    def write(self, renewed: int = 0) -> None:
        data = json.dumps(asdict(replace(self.holder, renewed=renewed))).encode().ljust(BYTES)
        if self.number is None:
            self.folder.write(self.name, data)
            return
        with naming(self.folder.path(self.name)):
            os.pwrite(self.number, data, 0)


@contextmanager
def locked(folder: Folder, name: str, holder: Holder) -> Iterator[Lock]:
    """The block runs as the one writer that has the lock file `name`, which is removed at its end.

    Raises LockedError where another process is, OSError where the file cannot be written.
    """
    number = _flock(folder, name) if folder.local is not None else None
    try:
        lock = Lock(folder, name, number, holder)
        before = read_holder(folder, name)
        if before is not None and _is_alive(folder, name, before, number is not None):
            raise _refused(folder, before)
        lock.write()
        if number is None:
            time.sleep(SETTLE_SECONDS)
        lock.verify()
        try:
            with _renewing(lock):
                yield lock
        except BaseException:
            with suppress(OSError, LockedError):
                _release(lock)
            raise
        _release(lock)
    finally:
        if number is not None:
            os.close(number)


def read_holder(folder: Folder, name: str) -> Holder | None:
    """Who wrote the lock file last; None where there is none, or one that is not whole."""
    try:
        return Holder(**json.loads(folder.read(name)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None


def is_held(folder: Folder, name: str, holder: Holder) -> bool:
    """Whether another's lock is held, as far as can be known without taking it."""
    if not holder.is_of_this_system:
        return True
    if folder.local is not None:
        try:
            number = _flock(folder, name, os.O_RDWR)
        except LockedError:
            return True
        except FileNotFoundError:
            return False
        if number is not None:
            os.close(number)
            return False
    return holder.host != socket.gethostname() or holder.is_running_here


def _is_alive(folder: Folder, name: str, before: Holder, flocked: bool) -> bool:
    """Whether the holder that the lock file names is still there, when the system's lock could be had or is none."""
    if before.is_of_this_system:
        if flocked:
            return False
        if before.host == socket.gethostname():
            return before.is_running_here
    return _is_renewed(folder, name, before)


def _is_renewed(folder: Folder, name: str, before: Holder) -> bool:
    """Whether the writer renews its lock while we watch. No two machines' clocks are compared."""
    end = time.monotonic() + WATCH_SECONDS
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(RENEW_SECONDS / 2, left))
        if read_holder(folder, name) != before:
            return True
    return False


def _refused(folder: Folder, holder: Holder | None) -> LockedError:
    return LockedError(
        f"{folder.out}: is being written by {holder or 'another process'}; wait for its end, or give another folder"
    )


def _release(lock: Lock) -> None:
    lock.verify()
    lock.folder.remove(lock.name)


def _flock(folder: Folder, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int | None:
    """The open lock file, locked; None where this file system has no locks. Raises LockedError where it is held."""
    assert folder.local is not None
    path = folder.local / name
    for _ in range(TRIES):
        number = os.open(path, flags, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(number, path):
                return number
            # Its former holder has just removed it.
            os.close(number)
        except BlockingIOError:
            os.close(number)
            # Another process may only have looked whether it is held.
            time.sleep(TRY_SECONDS)
        except OSError as error:
            os.close(number)
            if error.errno in NO_FLOCK:
                return None
            raise OSError(error.errno, error.strerror, str(path)) from error
    raise _refused(folder, read_holder(folder, name))


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


@contextmanager
def _renewing(lock: Lock) -> Iterator[None]:
    """Renew the lock from a thread of its own as long as the block runs."""
    done = threading.Event()

    def renew() -> None:
        renewed = 0
        while not done.wait(RENEW_SECONDS):
            renewed += 1
            # What fails now may succeed the next time; a lock that is not renewed for long is lost.
            with suppress(OSError):
                lock.write(renewed)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """When a process began, as the system counts; empty where it is not there, or the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
