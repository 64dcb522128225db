"""A folder that is in memory, where the system has such: what writes thousands of files there waits for no disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_MEMORY = "/dev/shm"


@contextmanager
def memory_folder() -> Iterator[Path]:
    """An empty folder, removed at the end with all that is in it."""
    where = IN_MEMORY if os.access(IN_MEMORY, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="k5-", dir=where) as folder:
        yield Path(folder)
