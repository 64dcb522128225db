"""Sources that cannot be used, change or have odd names, captions and progress: each is told, the others go on."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from encoding_jobs import WHOLE, CountingEncoder, Encode, contents, failing, make_video, shards, starts
from torch import Tensor

from k5kernels.latents import encode as encode_module
from k5kernels.latents.captions import CaptionError
from k5kernels.latents.job import EncodeSummary, Step
from k5kernels.latents.video import Clip, VideoError, read_clips


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
    encode: Encode, folder: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touching(path: str, *arguments: Any) -> Iterator[Clip]:
        for clip in read_clips(path, *arguments):
            if Path(path).name == "b.mp4":
                os.utime(path, (1, 1))
            yield clip

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "read_clips", touching)
        assert "b.mp4: was changed while it was read" in encode().failures[str(folder / "b.mp4")]
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


def test_a_caption_beside_a_video_that_cannot_be_used_is_told_and_tried_again(
    encode: Encode, folder: Path, tmp_path: Path
) -> None:
    for name, caption in (("a", b"a cat"), ("b", b"caf\xe9"), ("c", b"a dog")):
        (folder / f"{name}.txt").write_bytes(caption)
    counts: list[tuple[int, int]] = []
    summary = encode(on_captions=lambda *count: counts.append(count))
    assert counts == [(2, 3)]
    assert summary.failures == {
        str(folder / "b.mp4"): f"{folder}/b.mp4: its caption: {folder}/b.txt: expected text in UTF-8, byte 3 is none; "
        "convert it"
    }
    assert starts(tmp_path / "out") == [*WHOLE[:2], *WHOLE[3:]]
    (folder / "b.txt").write_text("a bird")
    assert encode().failures == {}
    captions = {sample.record.source: sample.record.caption for shard in shards(tmp_path / "out") for sample in shard}
    assert captions == {"a.mp4": "a cat", "b.mp4": "a bird", "c.mp4": "a dog"}
    assert len(starts(tmp_path / "out")) == len(WHOLE)


def test_a_given_caption_needs_none_beside_the_video(encode: Encode, folder: Path) -> None:
    (folder / "b.txt").touch()
    assert encode(captions={"b.mp4": "a bird"}).failures == {}


@pytest.mark.parametrize("index", [0, 1])
def test_a_caption_that_fits_two_videos_is_noticed_by_every_share(encode: Encode, folder: Path, index: int) -> None:
    """g.mp4 and g.mkv are of different shares."""
    shutil.copy(folder / "b.mp4", folder / "g.mkv")
    shutil.copy(folder / "b.mp4", folder / "g.mp4")
    (folder / "g.txt").write_text("whose?")
    (failed,) = encode(index=index, of=2).failures.values()
    assert "g.txt fits `g.mkv` and `g.mp4`" in failed


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
