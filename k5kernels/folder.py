"""A folder of files that are each whole or not there: on a local disk, or wherever fsspec reaches (s3://…)."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from k5kernels.atomic import flush_folder, replacing
from k5kernels.store_errors import is_of_a_store, store_error

# They have no folders: to make one would make its bucket.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"})


def is_url(path: str) -> bool:
    """Whether a path is fsspec's to open (s3://…), and not a file of this system's."""
    return "://" in path and not path.startswith(("file://", "local://"))


def filesystem_of(path: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises ValueError where its package is missing, or it is none."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error


def read_whole(path: str) -> bytes:
    """The content of a file or URL."""
    if not is_url(path):
        return Path(path).read_bytes()
    filesystem, inner = filesystem_of(path)
    with naming(path):
        return filesystem.cat_file(inner)


def list_names(folder: str) -> list[str]:
    """Names of what is in a folder or URL, sorted."""
    if not is_url(folder):
        return sorted(os.listdir(folder))
    filesystem, inner = filesystem_of(folder)
    with naming(folder):
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(inner, detail=False))


@contextmanager
def local_copy(file: str) -> Iterator[str]:
    """The path of a file on a local disk: itself, or until the block ends a copy of one that is elsewhere."""
    if not is_url(file):
        yield file
        return
    filesystem, inner = filesystem_of(file)
    with tempfile.NamedTemporaryFile(prefix="k5-") as copy:
        with naming(file):
            try:
                filesystem.get_file(inner, copy.name)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise OSError(error.errno, error.strerror, copy.name) from error
        yield copy.name


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file that is never seen in part: renamed when it is on the disk, one object elsewhere."""
    filesystem, inner = filesystem_of(str(path))
    with naming(str(path)):
        if isinstance(filesystem, LocalFileSystem):
            with replacing(inner) as partial:
                partial.write_bytes(data)
        else:
            filesystem.pipe_file(inner, data)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors in the block leave with this path in them: those of the system that name no file, and those of a store.

    A store's come as OSErrors without a number, or as none at all (no credentials, no connection): they become OSErrors
    with a number, and where it is known what to do about them they say so.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or (error.errno is None and not is_url(path)):
            raise
        raise store_error(error, path) if is_url(path) else OSError(error.errno, error.strerror, path) from error
    except Exception as error:
        if not is_of_a_store(error):
            raise
        raise store_error(error, path) from error


def _is_missing(path: Path) -> bool:
    """Whether nothing has this name; `Path.exists` would say so after other errors too."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


class Folder:
    """The folder at a path or URL. Errors of the file system are OSErrors that name the file."""

    def __init__(self, out: str | Path) -> None:
        self.out = str(out).rstrip("/") or "/"
        self._files, self._root = filesystem_of(self.out)
        self.local = Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    def path(self, name: str) -> str:
        return f"{self.out}/{name}"

    def create(self) -> None:
        """Make the folder, on the disk too, where it is not there yet.

        Raises ValueError where a file has that name, OSError where the folder cannot be made.
        """
        with naming(self.out):
            if self.local is None:
                protocols = self._files.protocol
                if OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols):
                    self._files.makedirs(self._root, exist_ok=True)
                return
            missing = list(takewhile(_is_missing, (self.local, *self.local.parents)))
            try:
                self.local.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise ValueError(f"{self.out}: expected a folder, or a name that is free, found a file") from None
            for folder in missing:
                flush_folder(folder.parent)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name; folders are left out."""
        with naming(self.out):
            if self.local is not None:
                sizes = {}
                with os.scandir(self.local) as entries:
                    for entry in entries:
                        # Another process may give a file its name, or remove it, while the folder is read.
                        with suppress(FileNotFoundError):
                            if entry.is_file():
                                sizes[entry.name] = entry.stat().st_size
                return sizes
            self._files.invalidate_cache()
            found = self._files.ls(self._root, detail=True)
            return {one["name"].rsplit("/", 1)[-1]: one["size"] for one in found if one["type"] == "file"}

    def read(self, name: str) -> bytes:
        with naming(self.path(name)):
            return self._files.cat_file(f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        write_whole(self.path(name), data)

    def remove(self, name: str) -> None:
        with naming(self.path(name)):
            self._files.rm_file(f"{self._root}/{name}")
