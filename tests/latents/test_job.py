"""Videos to a folder of shards: what one run leaves, and what the next ones make of it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from encoding_jobs import CountingEncoder, contents, make_video, shards, starts
from torch import Tensor

from k5kernels.latents import encode as encode_module
from k5kernels.latents.captions import CaptionError
from k5kernels.latents.job import EncodeSummary, Step, encode_videos
from k5kernels.latents.journal import Journal
from k5kernels.latents.shards import read_shard
from k5kernels.latents.video import EVERY_FRAME, Reading, VideoError

Encode = Callable[..., EncodeSummary]
WHOLE = [("a", 0), ("a", 5), ("b", 0), ("c", 0), ("c", 5), ("c", 10)]


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos of 11, 5 and 15 frames: 2, 1 and 3 clips of five frames."""
    for name, frames in (("a", 11), ("b", 5), ("c", 15)):
        make_video(tmp_path / "videos" / f"{name}.mp4", frames, seed=frames)
    return tmp_path / "videos"


@pytest.fixture
def encode(folder: Path, tmp_path: Path, encoder: CountingEncoder) -> Encode:
    """`encode_videos` of the folder in clips of 5 frames, 2 a shard, unless told otherwise."""

    def run(paths: list[Path] | None = None, out: str | Path = tmp_path / "out", **settings: Any) -> EncodeSummary:
        encoder.clips = 0
        return encode_videos(paths or [folder], encoder, out, **{"clip_frames": 5, "samples_per_shard": 2} | settings)

    return run


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@contextmanager
def failing(name: str, error: BaseException) -> Iterator[None]:
    """Reading the frames of the video of that name raises the error."""
    real = encode_module.read_clips

    def read(path: str, *arguments: Any) -> Any:
        if Path(path).name == name:
            raise error
        return real(path, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "read_clips", read)
        yield


def test_folder_becomes_shards_and_a_manifest(encode: Encode, tmp_path: Path) -> None:
    assert encode() == EncodeSummary(shards=3, samples=6)
    assert names(tmp_path / "out") == ["00000.tar", "00001.tar", "00002.tar", "manifest.json"]
    assert [len(shard) for shard in shards(tmp_path / "out")] == [2, 2, 2]
    assert starts(tmp_path / "out") == WHOLE
    keys = [sample.key for shard in shards(tmp_path / "out") for sample in shard]
    assert len(set(keys)) == len(keys)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [(one["source"], one["clips"], one["whole"]) for one in manifest["sources"]] == [
        ("a.mp4", 2, True),
        ("b.mp4", 1, True),
        ("c.mp4", 3, True),
    ]
    assert len(manifest["shards"]) == 3


def test_url_serves_as_folder(encode: Encode, tmp_path: Path) -> None:
    encode(out="memory://test_job/out")
    assert encode(out="memory://test_job/out").shards_kept == 3
    encode()
    for number in range(3):
        remote = [s.latent for s in read_shard(f"memory://test_job/out/{number:05d}.tar")]
        local = [s.latent for s in read_shard(tmp_path / "out" / f"{number:05d}.tar")]
        assert all(torch.equal(a, b) for a, b in zip(remote, local, strict=True))


def test_second_run_encodes_nothing(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode(samples_per_shard=4)
    before = contents(tmp_path / "out")
    assert encode(samples_per_shard=4).shards_kept == 2
    assert encoder.clips == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("place", ["absolute", "copied", "moved", "given one by one", "touched"])
def test_a_source_is_known_wherever_it_stands(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    encode([Path("videos")])
    before = contents(tmp_path / "out")
    paths = {
        "absolute": lambda: [folder],
        "copied": lambda: [shutil.copytree(folder, tmp_path / "copy")],
        "moved": lambda: [folder.rename(tmp_path / "moved")],
        "given one by one": lambda: [folder / "b.mp4", folder / "a.mp4", folder / "c.mp4"],
        "touched": lambda: [folder, os.utime(folder / "a.mp4", (1, 1))][:1],
    }[place]()
    summary = encode(paths)
    assert (encoder.clips, summary.shards_kept, summary.failures) == (0, 3, {})
    assert contents(tmp_path / "out") == before


def test_a_video_whose_name_sorts_first_is_appended(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder
) -> None:
    encode(samples_per_shard=4)
    before = contents(tmp_path / "out")
    make_video(folder / "0.mp4", 5, seed=7)
    assert encode(samples_per_shard=4) == EncodeSummary(shards=3, samples=7, shards_kept=2)
    assert encoder.clips == 1
    assert starts(tmp_path / "out") == [*WHOLE, ("0", 0)]
    after = contents(tmp_path / "out")
    assert all(after[name] == before[name] for name in ("00000.tar", "00001.tar"))


def test_another_folder_of_the_same_job_is_appended(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode()
    make_video(tmp_path / "more" / "a.mp4", 5, seed=7)
    assert encode([tmp_path / "more"]) == EncodeSummary(shards=4, samples=7, shards_kept=3)
    assert starts(tmp_path / "out") == [*WHOLE, ("a", 0)]


def test_removed_video_keeps_its_shards(encode: Encode, folder: Path, tmp_path: Path) -> None:
    encode()
    before = contents(tmp_path / "out")
    (folder / "c.mp4").unlink()
    assert encode() == EncodeSummary(shards=3, samples=6, shards_kept=3)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("same_time", [False, True])
def test_changed_video_is_encoded_too(encode: Encode, folder: Path, tmp_path: Path, same_time: bool) -> None:
    encode()
    before, status = contents(tmp_path / "out"), (folder / "b.mp4").stat()
    make_video(folder / "b.mp4", 5, seed=99)
    if same_time:
        os.utime(folder / "b.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert encode() == EncodeSummary(shards=4, samples=7, shards_kept=3)
    after = shards(tmp_path / "out")
    assert not torch.equal(after[3][0].latent, after[1][0].latent)
    assert after[3][0].key != after[1][0].key
    assert all(contents(tmp_path / "out")[name] == before[name] for name in before if name.endswith(".tar"))
    assert encode().shards_kept == 4


def test_folders_with_files_of_one_path(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    one, two, twin = (
        make_video(tmp_path / name / "clip.mp4", 5, seed) for name, seed in zip("123", (1, 2, 1), strict=True)
    )
    paths = [one.parent, two.parent, twin.parent]
    assert encode(paths).samples == encoder.clips == 2
    assert encode(paths).samples == 2
    assert encoder.clips == 0
    assert encode(paths[::-1]).samples == 2
    assert encoder.clips == 0


def test_of_each_video_the_first_clips_alone_can_be_taken(encode: Encode, tmp_path: Path) -> None:
    assert encode(max_clips=2).samples == len(starts(tmp_path / "out"))
    assert {start for _, start in starts(tmp_path / "out")} == {0, 5}
    assert encode(max_clips=2).shards_kept == encode(max_clips=2).shards


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"clip_frames": 9}, "clip_frames 5 there, 9 now"),
        ({"reading": EVERY_FRAME}, "fps 24 there, source now"),
        ({"reading": Reading(background=(255, 255, 255))}, "background #000000 there, #ffffff now"),
        ({"resolution": 512}, "resolution 256 there, 512 now"),
        ({"samples_per_shard": 3}, "samples_per_shard 2 there, 3 now"),
        ({"max_clips": 3}, "max_clips None there, 3 now"),
    ],
)
def test_another_jobs_folder_is_refused_with_the_difference(
    encode: Encode, tmp_path: Path, encoder: CountingEncoder, settings: dict, difference: str
) -> None:
    encode()
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"out: belongs to another job \({difference}\); .* or --overwrite"):
        encode(**settings)
    assert (encoder.clips, contents(tmp_path / "out")) == (0, before)


def test_other_weights_are_another_job(encode: Encode, encoder: CountingEncoder) -> None:
    encode()
    with torch.no_grad():
        encoder.conv_in.conv.bias.add_(1)
    with pytest.raises(ValueError, match="another encoder: other weights or precision"):
        encode()


def test_overwrite_deletes_what_another_job_left_and_nothing_of_its_own(
    encode: Encode, tmp_path: Path, encoder: CountingEncoder
) -> None:
    encode(clip_frames=9, out=tmp_path / "expected")
    encode()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert encode(clip_frames=9, overwrite=True).shards_kept == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert encode(clip_frames=9, overwrite=True).shards_kept == 2
    assert encoder.clips == 0


@pytest.mark.parametrize("removed", ["00000.tar", "00001.tar", "manifest.json"])
def test_overwriting_that_was_stopped_goes_on(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    encode(clip_frames=9, out=tmp_path / "expected")
    encode()
    real = os.remove

    def stop(path: str, *arguments: Any, **settings: Any) -> None:
        if str(path).endswith(removed):
            raise KeyboardInterrupt
        real(path, *arguments, **settings)

    monkeypatch.setattr(os, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(clip_frames=9, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="belongs to another job"):
        encode(clip_frames=9)
    encode(clip_frames=9, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_shards_from_elsewhere_are_not_overwritten(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"expected an empty folder or one with manifest\.json, found only 00000"):
            encode(overwrite=overwrite)
    assert contents(tmp_path / "out") == {"00000.tar": b"precious"}


@pytest.mark.parametrize("name", ["00003.tar", "00003.tar.partial"])
def test_a_file_in_the_place_of_the_next_shard(encode: Encode, folder: Path, tmp_path: Path, name: str) -> None:
    encode()
    make_video(folder / "d.mp4", 5)
    (tmp_path / "out" / name).write_bytes(b"precious, or half of a shard")
    if name.endswith(".partial"):
        assert encode().shards == 4
        assert not (tmp_path / "out" / name).exists()
    else:
        with pytest.raises(ValueError, match=r"00003\.tar: expected a whole tar"):
            encode()


def test_an_older_librarys_folder_is_another_job(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = {"settings": {"resolution": 256}, "sources": [], "shards": [5]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(old))
    (tmp_path / "out" / "00000.tar").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"belongs to another job .*written by an older k5kernels"):
        encode()
    assert encode(overwrite=True) == EncodeSummary(shards=3, samples=6)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"version": 2, "settings": {}, "sources": [{}]})])
def test_foreign_manifest_is_refused(encode: Encode, tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out/manifest\.json: expected"):
            encode(overwrite=overwrite)
    assert contents(tmp_path / "out") == {"manifest.json": text.encode()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard: expected at least 1, got 0"),
        ({"clip_frames": 24}, r"expected 1 \+ a multiple of 4, got 24"),
        ({"index": 2, "of": 2}, "index, of: expected an index from 0 to of - 1, .* got 2 of 2"),
        ({"index": -1}, "got -1 of 1"),
    ],
)
def test_settings_are_checked_before_any_work(encode: Encode, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(**settings)
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused(encode: Encode, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4: expected a folder, or a name that is free, found a file"):
        encode(out=folder / "a.mp4")


@pytest.mark.parametrize("killed_at", range(6))
def test_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    encode: Encode, tmp_path: Path, encoder: CountingEncoder, killed_at: int
) -> None:
    encode(out=tmp_path / "unbroken")

    def killed(self: CountingEncoder, video: Tensor) -> Tensor:
        if self.clips == killed_at:
            raise KeyboardInterrupt
        return CountingEncoder.forward(self, video)

    class Killed(CountingEncoder):
        forward = killed

    encoder.__class__ = Killed
    with pytest.raises(KeyboardInterrupt):
        encode()
    encoder.__class__ = CountingEncoder
    assert encode().shards_kept == killed_at // 2
    assert encoder.clips == 6 - killed_at // 2 * 2
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_run_that_is_stopped_before_its_first_shard_takes_nothing_back(
    encode: Encode, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode()
    shutil.copytree(tmp_path / "out", tmp_path / "unbroken")
    before = contents(tmp_path / "out")
    make_video(folder / "0.mp4", 5, seed=7)
    encode(out=tmp_path / "unbroken")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), failing("0.mp4", KeyboardInterrupt()):
            encode()
        after = contents(tmp_path / "out")
        assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))
        manifest = json.loads(after["manifest.json"])
        assert [one["clips"] for one in manifest["sources"][:3]] == [2, 1, 3]
        assert len(manifest["shards"]) == 3
    encode()
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_sources_of_a_stopped_run_come_before_those_of_the_next(
    encode: Encode, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("out", "unbroken"):
        if out == "out":
            with pytest.raises(KeyboardInterrupt), failing("b.mp4", KeyboardInterrupt()):
                encode(samples_per_shard=4)
        else:
            (folder / "0.mp4").unlink()
            encode(out=tmp_path / out, samples_per_shard=4)
        make_video(folder / "0.mp4", 5, seed=7)
        encode(out=tmp_path / out, samples_per_shard=4)
    assert starts(tmp_path / "out") == [*WHOLE, ("0", 0)]
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_shard_that_the_manifest_does_not_know_yet_is_taken_in(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(out=tmp_path / "unbroken")
    real = Journal.commit

    def commit(self: Journal, change: Any) -> None:
        if change.shards and change.shards[0][0] == 1:
            raise KeyboardInterrupt
        real(self, change)

    monkeypatch.setattr(Journal, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        encode()
    monkeypatch.undo()
    assert names(tmp_path / "out") == ["00000.tar", "00001.tar", "manifest.json"]
    assert encode().shards_kept == 2
    assert encoder.clips == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_shard_of_another_job_is_not_taken_in(encode: Encode, folder: Path, tmp_path: Path) -> None:
    encode()
    make_video(tmp_path / "other" / "x.mp4", 5)
    encode([tmp_path / "other"], out=tmp_path / "second")
    shutil.copy(tmp_path / "second" / "00000.tar", tmp_path / "out" / "00003.tar")
    with pytest.raises(ValueError, match=r"00003\.tar: expected a shard of this job, found one of x\.mp4"):
        encode()


def test_damaged_and_missing_shards_are_made_again(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").write_bytes(before["00001.tar"][:-100])
    (tmp_path / "out" / "00002.tar").unlink()
    assert encode().shards_kept == 1
    assert encoder.clips == 4
    assert contents(tmp_path / "out") == before


def test_missing_shard_of_a_source_that_is_gone_is_a_failure(encode: Encode, folder: Path, tmp_path: Path) -> None:
    encode()
    (tmp_path / "out" / "00001.tar").unlink()
    (folder / "b.mp4").unlink()
    make_video(folder / "d.mp4", 5)
    summary = encode()
    (why,) = summary.failures.values()
    assert "00001.tar: is missing or damaged, and was not made again: b.mp4" in why
    assert starts(tmp_path / "out") == [*WHOLE[:2], *WHOLE[4:], ("d", 0)]


def test_broken_videos_are_reported_and_the_others_encoded(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder
) -> None:
    (folder / "aa.mp4").write_text("not a video")
    make_video(folder / "bb.mp4", 1)
    missing = tmp_path / "missing.mp4"
    summary = encode([folder, missing])
    assert (summary.shards, summary.samples) == (3, 6)
    assert sorted(summary.failures) == sorted(map(str, (folder / "aa.mp4", folder / "bb.mp4", missing)))
    assert "at least 5 frames, decoded 1" in summary.failures[str(folder / "bb.mp4")]
    assert all(why.startswith(f"{file}: ") for file, why in summary.failures.items())
    assert starts(tmp_path / "out") == WHOLE
    again = encode([folder, missing])
    assert (again.shards_kept, again.failures, encoder.clips) == (3, summary.failures, 0)


def test_video_that_breaks_on_its_way_keeps_the_clips_before(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder
) -> None:
    # The index first, so that the file says what is missing at its end.
    with (
        av.open(str(make_video(tmp_path / "whole.mp4", 40))) as whole,
        av.open(str(folder / "aa.mp4"), "w", options={"movflags": "faststart"}) as cut,
    ):
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                cut.mux(packet)
    data = (folder / "aa.mp4").read_bytes()
    (folder / "aa.mp4").write_bytes(data[: len(data) * 3 // 4])
    summary = encode()
    assert "damaged or missing data after frame" in summary.failures[str(folder / "aa.mp4")]
    found = starts(tmp_path / "out")
    kept = [first for name, first in found if name == "aa"]
    assert 1 <= len(kept) < 8
    assert kept == [5 * number for number in range(len(kept))]
    assert [entry for entry in found if entry[0] != "aa"] == WHOLE
    before = contents(tmp_path / "out")
    again = encode()
    assert (again.failures, encoder.clips, contents(tmp_path / "out")) == (summary.failures, 0, before)


def test_content_that_failed_is_tried_again_only_when_asked(
    encode: Encode, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing("b.mp4", VideoError(f"{folder}/b.mp4: expected another decoder")):
        assert encode().failures == {str(folder / "b.mp4"): f"{folder}/b.mp4: expected another decoder"}
    assert list(encode().failures) == [str(folder / "b.mp4")]
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert encode([copy]).failures == {str(copy / "b.mp4"): f"{copy}/b.mp4: expected another decoder"}
    assert encode(retry_failed=True).failures == {}
    assert starts(tmp_path / "out") == [*WHOLE[:2], *WHOLE[3:], ("b", 0)]
    assert encode().failures == {}


def test_repaired_video_is_encoded(encode: Encode, folder: Path, tmp_path: Path) -> None:
    (folder / "aa.mp4").write_text("not a video")
    encode()
    make_video(folder / "aa.mp4", 5)
    assert not encode().failures
    assert starts(tmp_path / "out") == [*WHOLE, ("aa", 0)]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(5, "Input/output error"),
        OSError(116, "Stale file handle"),
        KeyError("of a decoder"),
        UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed"),
        RuntimeError("shape mismatch"),
        RecursionError("too deep"),
    ],
)
def test_what_is_not_the_contents_fault_is_one_line_and_tried_again(
    encode: Encode, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with failing("b.mp4", error):
        summary = encode()
    assert list(summary.failures) == [str(folder / "b.mp4")]
    assert summary.failures[str(folder / "b.mp4")].startswith(f"{folder}/b.mp4: ")
    assert summary.samples == 5
    assert encode() == EncodeSummary(shards=4, samples=6, shards_kept=3)
    assert starts(tmp_path / "out") == [*WHOLE[:2], *WHOLE[3:], ("b", 0)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "Cannot allocate memory"),
        (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "Cannot allocate memory"),
    ],
)
def test_what_would_fail_every_source_ends_the_job_with_the_path(
    encode: Encode, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    encode(out=tmp_path / "unbroken")
    with pytest.raises(OSError, match=words) as raised, failing("b.mp4", error):
        encode()
    assert str(folder / "b.mp4") in str(raised.value)
    assert encode().failures == {}
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_tried_again(encode: Encode, folder: Path) -> None:
    (folder / "b.mp4").chmod(0)
    assert list(encode().failures) == [str(folder / "b.mp4")]
    (folder / "b.mp4").chmod(0o644)
    assert encode().failures == {}


def test_video_that_changes_while_it_is_read_is_tried_again(
    encode: Encode, folder: Path, encoder: CountingEncoder
) -> None:
    class Touching(CountingEncoder):
        def forward(self, video: Tensor) -> Tensor:
            if self.clips == 2:
                os.utime(folder / "b.mp4", (1, 1))
            return CountingEncoder.forward(self, video)

    encoder.__class__ = Touching
    assert "b.mp4: was changed while it was read" in encode().failures[str(folder / "b.mp4")]
    encoder.__class__ = CountingEncoder
    summary = encode()
    assert (summary.failures, summary.samples, encoder.clips) == ({}, 6, 0)


def test_video_that_changes_between_two_runs_is_begun_anew(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of c.mp4 one clip is in a shard when the run is stopped."""

    class Killed(CountingEncoder):
        def forward(self, video: Tensor) -> Tensor:
            if self.clips == 5:
                raise KeyboardInterrupt
            return CountingEncoder.forward(self, video)

    encoder.__class__ = Killed
    with pytest.raises(KeyboardInterrupt):
        encode()
    encoder.__class__ = CountingEncoder
    make_video(folder / "c.mp4", 10, seed=1)
    assert encode().failures == {}
    assert starts(tmp_path / "out") == [*WHOLE[:4], ("c", 0), ("c", 5)]
    assert encode() == EncodeSummary(shards=3, samples=6, shards_kept=3)


@pytest.mark.parametrize(
    "name", [b"caf\xe9.mp4", b"line\nbreak.mp4", b"\x1b[31m.mp4", "été.mp4".encode(), b"a b%s{}.mp4"]
)
def test_any_name_is_encoded(encode: Encode, folder: Path, tmp_path: Path, name: bytes) -> None:
    os.rename(folder / "b.mp4", folder / os.fsdecode(name))
    assert encode() == EncodeSummary(shards=3, samples=6)
    assert [s.record.source for shard in shards(tmp_path / "out") for s in shard].count(os.fsdecode(name)) == 1
    assert encode().shards_kept == 3


def test_nothing_but_broken_videos_gives_no_shard(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("not a video")
    summary = encode([tmp_path / "x.mp4"])
    assert (summary.shards, summary.samples, len(summary.failures)) == (0, 0, 1)


def test_files_without_a_video_are_left_out_by_content_not_by_name(
    encode: Encode, folder: Path, tmp_path: Path
) -> None:
    (folder / "b.mp4").rename(folder / "b.unheard")
    (folder / "text.unheard").write_text("not a video")
    (folder / "b.txt").write_text("noise")
    summary = encode()
    assert summary.failures == {}
    assert list(summary.left_out) == [str(folder / "text.unheard")]
    assert summary.others == {".txt": 1}
    assert starts(tmp_path / "out") == WHOLE
    assert encode().left_out == summary.left_out
    assert list(encode([folder / "text.unheard"]).failures) == [str(folder / "text.unheard")]


def test_the_folder_to_write_to_is_no_source(encode: Encode, folder: Path) -> None:
    encode(out=folder / "latents")
    summary = encode(out=folder / "latents")
    assert list(summary.left_out) == [str(folder / "latents")]
    assert summary.others == {}


def test_captions_travel_in_the_shards(encode: Encode, folder: Path, tmp_path: Path) -> None:
    (folder / "b.txt").write_text("b from beside")
    (folder / "c.txt").write_text("c from beside")
    summary = encode(captions={"c.mp4": "c as given"})
    assert (summary.captioned, summary.sources) == (2, 3)
    captions = {sample.record.source: sample.record.caption for shard in shards(tmp_path / "out") for sample in shard}
    assert captions == {"a.mp4": None, "b.mp4": "b from beside", "c.mp4": "c as given"}


@pytest.mark.parametrize(
    ("captions", "words"),
    [({"x.mp4": "another video"}, "none that fits"), ({"clip": "one of two"}, "by path below the folder")],
)
def test_captions_that_fit_no_source_or_two_are_refused_before_anything_is_written(
    encode: Encode, folder: Path, tmp_path: Path, captions: dict[str, str], words: str
) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(folder / "a.mp4", folder / name / "clip.mp4")
    with pytest.raises(CaptionError, match=words):
        encode(captions=captions)
    assert not (tmp_path / "out").exists()


def test_progress_follows_the_sources(encode: Encode, folder: Path) -> None:
    (folder / "bb.mp4").write_text("not a video")
    steps: list[Step] = []
    encode(progress=steps.append)
    ended = [step for step in steps if step.outcome is not None]
    assert [(Path(s.source).name, s.number, s.sources, s.clips) for s in ended] == [
        ("a.mp4", 1, 4, 2),
        ("b.mp4", 2, 4, 1),
        ("bb.mp4", 3, 4, 0),
        ("c.mp4", 4, 4, 3),
    ]
    assert [step.outcome == "" for step in ended] == [True, True, False, True]
    assert ended[-1].bytes_done == ended[-1].bytes_all
    assert [(s.frames, s.announced) for s in steps if s.source.endswith("a.mp4") and s.clips][-1] == (10, 11)
    steps.clear()
    encode(progress=steps.append)
    assert {step.compared for step in steps} == {True}
    assert len({step.source for step in steps}) == 4
