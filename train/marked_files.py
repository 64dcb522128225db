"""Files of which a mark is taken while they are written, so that a damaged one is told from a whole one."""

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import FileSystem

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@dataclass(frozen=True)
class FileMark:
    """What tells a file from a damaged one."""

    bytes: int
    sha256: str


def mark_of(path: Path) -> FileMark:
    """The mark of a file as it is now. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileMark(file.tell(), digest)


class MarkedFiles(FileSystem):
    """marks: of the files that have been written, by name; nothing is read back for them."""

    def __init__(self) -> None:
        self.marks: dict[str, FileMark] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file to write."""
        path = Path(path)
        with _HashedFile(path) as file:
            yield file
        self.marks[path.name] = FileMark(path.stat().st_size, file.digest.hexdigest())


class _HashedFile(io.BufferedWriter):
    """A file that is written from its beginning to its end, and on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, data: "ReadableBuffer", /) -> int:
        self.digest.update(data)
        return super().write(data)

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()
