"""A disk that is full for one file: what is written on the way to that name goes to a device that is always full."""

from pathlib import Path

import pytest

FULL_DISK = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="needs a device that is always full")


def fill_disk_under(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`k5kernels.atomic.replacing` touches `<name>.partial` before it gives it out; here that makes a link."""
    touch = Path.touch

    def link_or_touch(path: Path, *arguments, **settings) -> None:
        if path.name == f"{name}.partial":
            path.symlink_to(FULL_DISK)
        else:
            touch(path, *arguments, **settings)

    monkeypatch.setattr(Path, "touch", link_or_touch)


def fill_disk_in(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of this name is made with a file in it that is such a link."""
    mkdir = Path.mkdir

    def make_with_link(path: Path, *arguments, **settings) -> None:
        mkdir(path, *arguments, **settings)
        if path.name == folder:
            (path / name).symlink_to(FULL_DISK)

    monkeypatch.setattr(Path, "mkdir", make_with_link)
