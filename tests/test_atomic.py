"""Files are whole or not there, and an error names the file."""

import errno

import pytest

from k5kernels.atomic import replacing


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


def test_a_full_disk_is_told_with_the_path(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_that_names_another_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "file"):
        (tmp_path / "other").read_text()
