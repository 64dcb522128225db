"""A folder of whole files: on the disk and elsewhere, and what an error says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k5kernels.folder import Folder, naming, write_whole


@pytest.fixture(params=["{tmp}/a/b", "memory://test_folder{tmp}"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    made = Folder(request.param.format(tmp=tmp_path))
    made.create()
    return made


def test_what_is_written_is_read_and_listed(folder: Folder) -> None:
    folder.write("one", b"123")
    folder.write("two", b"")
    folder.write("one", b"1234")
    assert folder.read("one") == b"1234"
    assert folder.sizes() == {"one": 4, "two": 0}
    folder.remove("one")
    assert folder.sizes() == {"two": 0}
    folder.create()
    assert folder.sizes() == {"two": 0}


def test_a_file_that_another_process_takes_away_while_the_folder_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    for name in ("first", "second", "third"):
        folder.write(name, b"12")
    scan = os.scandir

    @contextmanager
    def scan_and_lose(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scan(path) as entries:
            found = list(entries)
        (tmp_path / "second").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scan_and_lose)
    assert folder.sizes() == {"first": 2, "third": 2}


def test_missing_file_is_named(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/none'"):
        folder.read("none")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a folder, or a name that is free, found a file"):
        Folder(tmp_path / "file").create()


def test_error_without_a_file_gets_one() -> None:
    with pytest.raises(OSError, match="No space left on device: 'out/file'"), naming("out/file"):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="other"), naming("out/file"):
        raise OSError(28, "No space left on device", "other")


def test_file_and_name_are_on_the_disk_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        calls.append(f"fsync {os.readlink(f'/proc/self/fd/{number}')}")
        fsync(number)

    def replaced(before: Path, after: Path) -> None:
        calls.append(f"replace {after}")
        replace(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_whole(tmp_path / "file", b"whole")
    assert calls == [f"fsync {tmp_path}/file.partial", f"replace {tmp_path}/file", f"fsync {tmp_path}"]


def test_full_disk_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"before")

    def fail(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"after")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"
