"""A tree of folders of which the files are not there: what lists them sees them all the same."""

import os
from pathlib import Path
from typing import Any

import pytest

FILES = 100  # in each folder


class Entry:
    """As `os.scandir` gives them."""

    def __init__(self, folder: str, number: int, status: os.stat_result) -> None:
        self.name, self.path, self._status = f"{number:03d}.mp4", f"{folder}/{number:03d}.mp4", status

    def is_symlink(self) -> bool:
        return False

    def is_dir(self, follow_symlinks: bool) -> bool:
        return False

    def stat(self, follow_symlinks: bool) -> os.stat_result:
        values = list(self._status)
        values[1] = hash(self.path)
        return os.stat_result(values)


class Entries(list[Entry]):
    def __enter__(self) -> "Entries":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def simulate_tree(root: Path, folders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each of so many folders, which are there, seem to hold FILES videos."""
    for number in range(folders):
        (root / f"{number:04d}").mkdir(parents=True)
    scandir, status = os.scandir, os.stat(__file__)

    def simulated(folder: Any = ".") -> Any:
        if isinstance(folder, str) and os.path.dirname(folder) == str(root):
            return Entries(Entry(folder, number, status) for number in range(FILES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", simulated)
