"""Videos to a folder of shards: what one run leaves, and what the next ones make of it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding_jobs import WHOLE, CountingEncoder, Encode, contents, failing, make_video, names, shards, starts
from torch import Tensor

from k5kernels.latents.job import EncodeSummary
from k5kernels.latents.journal import Journal
from k5kernels.latents.shards import read_shard
from k5kernels.latents.video import EVERY_FRAME, Reading


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
        ({"mode": "exact"}, "mode stream there, exact now"),
        ({"memory_budget": 2**33}, "memory_budget None there, 8589934592 now"),
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


def test_another_dtype_is_another_job_also_of_the_same_weights(encode: Encode, encoder: CountingEncoder) -> None:
    encoder.to(torch.bfloat16).to(torch.float32)
    encode()
    encoder.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"another job \(dtype float32 there, bfloat16 now\)"):
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
        with pytest.raises(
            ValueError, match=r"out/manifest\.json: is damaged, or not of k5 encode .*; put a copy back"
        ):
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


def test_a_manifest_from_before_some_shards_is_refused(encode: Encode, folder: Path, tmp_path: Path) -> None:
    """Two more shards than it knows: to go on from there would write over them."""
    encode()
    earlier = (tmp_path / "out" / "manifest.json").read_bytes()
    make_video(folder / "d.mp4", 15)
    encode()
    (tmp_path / "out" / "manifest.json").write_bytes(earlier)
    before = contents(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"out/manifest\.json: knows 3 shards, but 00004\.tar is there too; put .* back"
    ):
        encode()
    assert contents(tmp_path / "out") == before


def test_changes_without_their_manifest_are_refused(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.change00000003.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"with manifest\.json, found only manifest\.change00000003\.json"):
        encode()


def test_a_whole_shard_of_another_size_is_kept(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    """As of a run that was stopped when it had just made the shard again; one of other clips is a failure."""
    encode()
    path = tmp_path / "out" / "00001.tar"
    longer = path.read_bytes() + bytes(512)
    path.write_bytes(longer)
    assert encode() == EncodeSummary(shards=3, samples=6, shards_kept=2)
    assert encoder.clips == 0
    assert path.read_bytes() == longer
    assert encode().shards_kept == 3
    others = (tmp_path / "out" / "00000.tar").read_bytes()
    path.write_bytes(others)
    summary = encode()
    assert "00001.tar: holds other clips than the manifest says; move it" in summary.failures[str(path)]
    assert path.read_bytes() == others


def test_missing_shard_of_a_source_that_is_gone_is_a_failure(encode: Encode, folder: Path, tmp_path: Path) -> None:
    encode()
    (tmp_path / "out" / "00001.tar").unlink()
    (folder / "b.mp4").unlink()
    make_video(folder / "d.mp4", 5)
    summary = encode()
    (why,) = summary.failures.values()
    assert "00001.tar: is missing or damaged, and was not made again: b.mp4" in why
    assert starts(tmp_path / "out") == [*WHOLE[:2], *WHOLE[4:], ("d", 0)]
