"""Files are whole or not there, and an error names the file."""

import errno
import os

import pytest

from k5kernels.atomic import replacing


def write(path, text="whole"):
    with replacing(path) as partial:
        partial.write_text(text)


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert not partial.exists()


def test_a_failure_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("former")

    def write_half():
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "former"


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / "file.partial").write_text("half, and longer than the whole")
    write(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_mode_that_open_gives(tmp_path, umask, mode):
    def write_as_private_temporary_file(path):
        with replacing(path) as partial:
            (tmp_path / "temporary").write_text("whole")
            (tmp_path / "temporary").chmod(0o600)
            (tmp_path / "temporary").replace(partial)

    before = os.umask(umask)
    try:
        write(tmp_path / "one")
        write_as_private_temporary_file(tmp_path / "two")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "two")} == {mode}


def test_a_file_that_was_there_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    path.write_text("former")
    path.chmod(0o640)
    write(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_still_leads_to_the_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "whole"


def test_the_file_is_on_disk_before_it_gets_its_name_and_the_name_before_the_next_file(tmp_path, monkeypatch):
    events = []
    replace = os.replace

    def fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def record(source, target):
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", record)
    write(tmp_path / "file")
    path = os.path.realpath(tmp_path / "file")
    assert events == [("fsync", f"{path}.partial"), ("rename", path), ("fsync", os.path.dirname(path))]


def test_a_disk_that_cannot_flush_leaves_the_former_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("former")

    def fsync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Input/output error: '.*file'"):
        write(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "former"


def test_a_full_disk_is_told_with_the_path(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_that_names_another_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "file"):
        (tmp_path / "other").read_text()


def test_a_folder_that_is_not_there_is_told_with_the_path_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*none/file'"):
        write(tmp_path / "none" / "file")


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match="file'"):
        write(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
