"""Sources and shards in an object store: as on a disk; whatever call fails, the next run goes on from what is there.

The store is fsspec's in memory, under a protocol of its own whose calls can be made to fail.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import fsspec
import pytest
from encoding_jobs import CountingEncoder, Encode, contents, make_video
from fsspec.implementations.memory import MemoryFileSystem

from k5kernels import lock
from k5kernels.latents.job import EncodeSummary, encode_videos
from k5kernels.latents.sources import find_sources


class Store(MemoryFileSystem):
    """fail_at: number of the call that raises `error`, before it has an effect or, like a lost answer, after it."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[int] = 0
    fail_at: ClassVar[int] = 0
    after: ClassVar[bool] = False
    error: ClassVar[BaseException] = OSError()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"faulty://{name}"

    def _counted(self, name: str, *arguments: Any, **options: Any) -> Any:
        Store.calls += 1
        fails = Store.calls == Store.fail_at
        if fails and not Store.after:
            raise Store.error
        result = getattr(MemoryFileSystem, name)(self, *arguments, **options)
        if fails:
            raise Store.error
        return result

    def pipe_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        return self._counted("pipe_file", path, *arguments, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        return self._counted("cat_file", path, *arguments, **options)

    def rm_file(self, path: str) -> Any:
        return self._counted("rm_file", path)

    def ls(self, path: str, *arguments: Any, **options: Any) -> Any:
        return self._counted("ls", path, *arguments, **options)

    def makedirs(self, path: str, exist_ok: bool = False) -> Any:
        return self._counted("makedirs", path, exist_ok)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    fsspec.register_implementation("faulty", Store, clobber=True)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(lock, "TRY_SECONDS", 0)
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    Store.calls = Store.fail_at = 0
    yield Store
    Store.store.clear()


def stored(folder: str) -> dict[str, bytes]:
    """Every object below a folder of the store."""
    return {
        name.rsplit("/", 1)[1]: file.getvalue() for name, file in Store.store.items() if name.startswith(f"/{folder}/")
    }


def upload(folder: Path, name: str) -> str:
    for path in folder.rglob("*.*"):
        Store.store[f"/{name}/{path.relative_to(folder)}"] = fsspec.implementations.memory.MemoryFile(
            None, None, path.read_bytes()
        )
    return f"faulty://{name}"


def test_sources_at_a_url_give_the_shards_of_the_same_files_on_a_disk(
    encode: Encode,
    folder: Path,
    tmp_path: Path,
    encoder: CountingEncoder,
    store: type[Store],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    make_video(folder / "more" / "d.mp4", 6)
    (folder / "b.txt").write_text("A caption")
    (folder / "broken.mp4").write_bytes(b"no video")
    expected = encode()
    url = upload(folder, "videos")
    summary = encode([url], out=f"{url}/latents")
    assert stored("videos/latents") == contents(tmp_path / "out")
    assert (summary.samples, summary.captioned) == (expected.samples, 1)
    assert list(summary.failures) == [f"{url}/broken.mp4"]
    assert summary.failures[f"{url}/broken.mp4"].startswith(f"{url}/broken.mp4: expected a readable video file")
    # A source is known again, and of the folder that is written to nothing is taken for one.
    Store.store["/videos/latents/x.mp4"] = Store.store["/videos/a.mp4"]
    again = encode([url], out=f"{url}/latents")
    assert (again.samples, again.failures, encoder.clips) == (expected.samples, summary.failures, 0)
    assert list(temporary.iterdir()) == []


def test_a_full_disk_for_copies_ends_the_job_with_its_place(
    encode: Encode, folder: Path, tmp_path: Path, store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(folder, "videos")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "get_file", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/k5-"):
            encode([url])
    assert encode([url]).samples == 6


def test_a_file_at_a_url_is_taken_by_its_name(encode: Encode, folder: Path, store: type[Store]) -> None:
    url = upload(folder, "videos")
    listing = find_sources([f"{url}/a.mp4", f"{url}/none.mp4"])
    assert [(one.file, one.path, one.named) for one in listing.sources] == [(f"{url}/a.mp4", "a.mp4", True)]
    assert list(listing.failures) == [f"{url}/none.mp4"]


@pytest.mark.parametrize("give", ["out", "videos"])
def test_a_store_whose_package_is_missing_is_refused_in_words(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, give: str
) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match="s3://bucket/x: Install s3fs to access S3"):
        encode(**({"out": "s3://bucket/x"} if give == "out" else {"paths": ["s3://bucket/x"], "out": "s3://bucket/x"}))


class FaultyJob:
    """A job that was finished, to which a video was added: what a run of it does at a store."""

    def __init__(self, videos: Path) -> None:
        self.videos = videos
        self.run()
        self.begun = dict(Store.store)
        make_video(videos / "0.mp4", 6, seed=9)
        Store.calls = 0
        self.run()
        self.calls = Store.calls
        self.expected = stored("out")

    def run(self) -> EncodeSummary:
        return encode_videos([self.videos], CountingEncoder(), "faulty://out", clip_frames=5, samples_per_shard=2)

    def check(self, call: int, error: BaseException, after: bool) -> None:
        Store.store.clear()
        Store.store.update(self.begun)
        before = {name: data for name, data in stored("out").items() if name.endswith(".tar")}
        Store.calls, Store.fail_at, Store.error, Store.after = 0, call, error, after
        try:
            self.run()
        except type(error):
            pass
        finally:
            Store.fail_at = 0
        assert stored("out").items() >= before.items(), (call, after)
        self.run()
        assert stored("out") == self.expected, (call, after)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "stopped"])
def test_whatever_call_of_a_store_fails_the_next_run_ends_as_an_undisturbed_one(
    folder: Path, store: type[Store], monkeypatch: pytest.MonkeyPatch, error: BaseException, after: bool
) -> None:
    # A lock that a run could not remove is its own: that process is no more.
    monkeypatch.setattr(lock.Holder, "is_running_here", property(lambda holder: False))
    job = FaultyJob(folder)
    assert job.calls > 15
    for call in range(1, job.calls + 1):
        job.check(call, error, after)
