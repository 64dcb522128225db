"""Which files a job takes, by which names, and what it leaves out."""

import errno
import os
import resource
import socket
import tracemalloc
from pathlib import Path

import pytest
from simulated_tree import FILES, simulate_tree

from k5kernels.latents import sources as module
from k5kernels.latents.sources import Listing, content_hash, find_sources, is_of_share


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def taken(listing: Listing) -> list[str]:
    return [source.path for source in listing.sources]


def test_folders_stand_for_what_is_in_them_at_any_depth(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("c.mp4", "a.mp4", "more/deep/D.MP4", "more.mp4", "b.unheard", "none")))
    listing = find_sources([tmp_path])
    assert taken(listing) == ["a.mp4", "b.unheard", "c.mp4", "more/deep/D.MP4", "more.mp4", "none"]
    assert [source.file for source in listing.sources][3] == str(tmp_path / "more/deep/D.MP4")
    assert (listing.failures, listing.left_out, listing.others) == ({}, {}, {})


def test_a_named_file_is_expected_to_be_a_video_and_one_in_a_folder_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path / "folder" / "a.mp4", tmp_path / "folder" / "b.unheard", tmp_path / "c.unheard")
    listing = find_sources([tmp_path / "folder", tmp_path / "c.unheard"])
    assert {source.path: source.is_expected for source in listing.sources} == {
        "a.mp4": True,
        "b.unheard": False,
        "c.unheard": True,
    }


@pytest.mark.parametrize("given", [["{0}", "{0}"], ["{0}", "{0}/a.mp4"], ["{0}/a.mp4", "{0}"], ["{0}", "{0}/../{1}"]])
def test_each_file_is_taken_once(tmp_path: Path, given: list[str]) -> None:
    touch(tmp_path / "a.mp4")
    assert taken(find_sources([path.format(tmp_path, tmp_path.name) for path in given])) == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".wmv", ".flv", ".3gp", ".ogv", ".mxf", ".m2ts", ".y4m", ".webp", ".jpg"])
def test_formats_that_the_decoder_may_open_are_taken(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path / f"a{suffix}")
    (source,) = find_sources([tmp_path]).sources
    assert source.is_expected


def test_files_that_stand_beside_videos_are_counted(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.mp4", "a.txt", "b.TXT", "a.json", "._a.mp4")))
    listing = find_sources([tmp_path])
    assert taken(listing) == ["a.mp4"]
    assert listing.others == {".txt": 2, ".json": 1, ".mp4": 1}


def test_links_are_followed_without_loops_and_each_file_once(tmp_path: Path) -> None:
    touch(tmp_path / "given" / "a.mp4", tmp_path / "given" / "sub" / "b.mp4", tmp_path / "outside" / "c.mp4")
    touch(tmp_path / "d.mp4")
    given = tmp_path / "given"
    (given / "0 linked").symlink_to(tmp_path / "outside")
    (given / "sub" / "loop").symlink_to(given)
    (given / "z.mp4").symlink_to(given / "a.mp4")
    (given / "y.mp4").symlink_to(tmp_path / "d.mp4")
    (tmp_path / "outside" / "back").symlink_to(given / "sub")
    listing = find_sources([given])
    assert taken(listing) == ["0 linked/c.mp4", "a.mp4", "sub/b.mp4", "y.mp4"]
    assert listing.failures == {}
    assert {Path(file).name: why.removeprefix(f"{file}: ") for file, why in listing.left_out.items()} == {
        "loop": f"the same folder as {given}",
        "z.mp4": f"a link to {given}/a.mp4, which is taken",
        "back": f"the same folder as {given}/sub",
    }


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "none")
    (tmp_path / "notes").symlink_to(tmp_path / "none")
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    listing = find_sources([tmp_path])
    assert taken(listing) == ["a.mp4"]
    assert sorted(Path(file).name for file in listing.failures) == ["b.mp4", "self.mp4"]
    assert list(listing.left_out) == [str(tmp_path / "notes")]
    assert all("a link that leads nowhere" in why for why in (*listing.failures.values(), *listing.left_out.values()))


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(tmp_path / "socket"))
    listing = find_sources([tmp_path])
    assert taken(listing) == ["a.mp4"]
    assert set(listing.left_out.values()) == {
        f"{tmp_path}/pipe.mp4: a device, pipe or socket",
        f"{tmp_path}/socket: a device, pipe or socket",
    }


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_unreadable_folder_is_a_failure_and_the_rest_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "closed" / "b.mp4")
    scandir = os.scandir

    def closed(folder: str):
        if Path(folder).name == "closed":
            raise OSError(number, os.strerror(number), folder)
        return scandir(folder)

    monkeypatch.setattr(module.os, "scandir", closed)
    listing = find_sources([tmp_path])
    assert taken(listing) == ["a.mp4"]
    assert listing.failures == {f"{tmp_path}/closed": f"{tmp_path}/closed: {os.strerror(number)}"}


def test_too_many_open_files_end_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: str):
        raise OSError(errno.EMFILE, "Too many open files", folder)

    monkeypatch.setattr(module.os, "scandir", full)
    with pytest.raises(OSError, match=f"Too many open files: '{tmp_path}'"):
        find_sources([tmp_path])


def test_missing_file_is_a_failure(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    listing = find_sources([tmp_path / "none.mp4", tmp_path / "a.mp4"])
    assert taken(listing) == ["a.mp4"]
    assert listing.failures == {f"{tmp_path}/none.mp4": f"{tmp_path}/none.mp4: No such file or directory"}


@pytest.mark.parametrize("given", [[], ["{0}"]])
def test_nothing_to_encode_is_refused(tmp_path: Path, given: list[str]) -> None:
    touch(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="paths: expected video files, pictures or folders with some, found none"):
        find_sources([path.format(tmp_path) for path in given])


def test_names_of_any_bytes_are_taken(tmp_path: Path) -> None:
    names = [b"caf\xe9.mp4", b"a\nb.mp4", "été.mp4".encode(), b"-.mp4", b" .mp4"]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    assert sorted(os.fsencode(path) for path in taken(find_sources([tmp_path]))) == sorted(names)


def test_content_hash_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert content_hash(str(tmp_path / "a")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(b"x" * (1 << 20) + b"y")
    whole = content_hash(str(tmp_path / "a"))
    for place in (0, 600_000, 1 << 20):
        with (tmp_path / "a").open("r+b") as file:
            file.seek(place)
            file.write(b"z")
        assert content_hash(str(tmp_path / "a")) != whole


def test_every_source_is_of_one_share_and_the_shares_are_alike() -> None:
    paths = [f"folder/{number}.mp4" for number in range(1000)]
    shares = [[path for path in paths if is_of_share(path, index, 4)] for index in range(4)]
    assert sorted(path for share in shares for path in share) == sorted(paths)
    assert all(200 < len(share) < 300 for share in shares)
    assert all(is_of_share(path, 0, 1) for path in paths)


@pytest.mark.parametrize("folders", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_very_many_files_take_little_memory_and_few_open_files(
    folders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulated tree: folders of 100 files, of which only the folders are there."""
    simulate_tree(tmp_path, folders, monkeypatch)
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 16, hard))
    tracemalloc.start()
    try:
        listing = find_sources([tmp_path])
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(listing.sources) == folders * FILES
    assert used < 1000 * len(listing.sources)
