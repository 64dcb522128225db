"""A manifest on its way to the disk: whole in one file, and the changes since then in small files of their own.

To write the whole manifest at each change would cost the square of its length over a job of many sources. So it is
written whole while it is small, and later whenever the changes since then have grown to a part of it. The changes are
files, not lines of one, because object stores cannot append.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from k5kernels.folder import Folder
from k5kernels.latents.manifest import (
    Change,
    Manifest,
    ManifestError,
    NewerManifestError,
    OldManifestError,
    change_from_json,
    change_to_json,
    manifest_from_json,
    manifest_to_json,
)

MANIFEST = "manifest.json"
CHANGE = re.compile(r"manifest\.change(\d{8})\.json")
SMALL_BYTES = 1 << 18
GROWTH = 4
TRIES = 5


class Journal:
    """The manifest of one part of a folder, in memory and in the folder; every change is in both.

    prefix: what the names of this part's files begin with.
    """

    def __init__(self, folder: Folder, prefix: str, manifest: Manifest) -> None:
        """A new manifest; nothing is written before the first change."""
        self.folder, self.prefix, self.manifest = folder, prefix, manifest
        self._whole_bytes, self._changes_bytes = 0, 0
        self._changes: list[int] = []

    @classmethod
    def load(cls, folder: Folder, prefix: str) -> "Journal | None":
        """What is in the folder, where a part of this prefix is.

        Raises ManifestError where a file is not as it was written, OSError where one cannot be read.
        """
        for _ in range(TRIES):
            before = folder.sizes()
            try:
                return cls._load(folder, prefix, change_numbers(prefix, before))
            except (FileNotFoundError, ManifestError):
                if folder.sizes() == before:
                    raise
                # Its writer may have put the changes into the whole manifest meanwhile, and begun to number new ones.
        raise ManifestError(f"{folder.path(prefix + MANIFEST)}: changes faster than it can be read; try again")

    @classmethod
    def _load(cls, folder: Folder, prefix: str, numbers: list[int]) -> "Journal | None":
        name = f"{prefix}{MANIFEST}"
        try:
            data = folder.read(name)
        except FileNotFoundError:
            return None
        with _named(folder.path(name)):
            journal = cls(folder, prefix, manifest_from_json(data))
        journal._whole_bytes, journal._changes = len(data), numbers
        # The first ones may have been removed already, as `write_whole` does; none in between.
        for expected, number in enumerate(numbers, start=numbers[0] if numbers else 0):
            path = folder.path(change_name(prefix, number))
            with _named(path):
                if number != expected:
                    raise ManifestError(f"the change before it, {expected}, is missing")
                data = folder.read(change_name(prefix, number))
                journal.manifest.apply(change_from_json(number, data))
            journal._changes_bytes += len(data)
        return journal

    def commit(self, change: Change) -> None:
        """Apply a change and write it. Raises OSError where that cannot be; the folder is then as it was."""
        self.manifest.apply(change)
        if self._whole_bytes < SMALL_BYTES or self._whole_bytes <= GROWTH * self._changes_bytes:
            self.write_whole()
            return
        number = self._changes[-1] + 1 if self._changes else 0
        data = change_to_json(number, change)
        self.folder.write(change_name(self.prefix, number), data)
        self._changes.append(number)
        self._changes_bytes += len(data)

    def write_whole(self) -> None:
        """Write the manifest whole, then remove the changes that are now in it, the first one first.

        Whatever stops this leaves the last changes, and to apply these again does nothing.
        """
        data = manifest_to_json(self.manifest)
        self.folder.write(f"{self.prefix}{MANIFEST}", data)
        self._whole_bytes, self._changes_bytes = len(data), 0
        while self._changes:
            self.folder.remove(change_name(self.prefix, self._changes[0]))
            del self._changes[0]

    def close(self) -> None:
        """Leave one file."""
        if self._changes:
            self.write_whole()


def change_name(prefix: str, number: int) -> str:
    return f"{prefix}manifest.change{number:08d}.json"


def change_numbers(prefix: str, names: Iterable[str]) -> list[int]:
    """Numbers of the changes of this prefix among the names of files, in order."""
    own = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return sorted(int(match[1]) for name in own if (match := CHANGE.fullmatch(name)))


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors of the block name the file, and say what to do about damage."""
    try:
        yield
    except (OldManifestError, NewerManifestError) as error:
        raise type(error)(f"{path}: {error}") from error
    except ManifestError as error:
        remedy = "put a copy back, or give another folder and encode anew"
        raise ManifestError(f"{path}: is damaged, or not of k5 encode ({error}); {remedy}") from error
