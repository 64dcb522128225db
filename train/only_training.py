"""One training at a time writes to a folder: two would take turns at its log and its checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k5kernels.folder import Folder
from k5kernels.lock import locked, this_process

LOCK = "train.lock"


@contextmanager
def only_training(out: Path) -> Iterator[None]:
    """The block runs as the only training that writes to the folder, which is made where there is none.

    A lock that a killed training left is taken over. Raises LockedError, a ValueError that names the process, where
    another training runs; OSError where the lock cannot be written.
    """
    folder = Folder(out)
    folder.create()
    with locked(folder, LOCK, this_process("training", 1)):
        yield
