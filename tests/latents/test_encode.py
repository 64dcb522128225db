"""Videos to latent shards: clips, their meta, resuming, and broken videos among whole ones."""

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k5kernels.latents.encode import EncodeSummary, encode_video, encode_videos, find_videos
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample, read_shard
from k5kernels.latents.video import VideoError, decode, read_video, to_model, write_video
from k5kernels.vae import HunyuanEncoder, VAEConfig
from train.clips import clip_path

Encode = Callable[..., EncodeSummary]


class CountingEncoder(HunyuanEncoder):
    """Stands in where the latents do not matter: means of 8×8 pixels, mixed by the first convolution's weights.

    Counts the clips it encodes and notes whether gradients were on.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(VAEConfig(widths=(16, 16, 16, 16), groups=16, layers_per_block=1))
        self.clips, self.grad = 0, False

    def forward(self, video: Tensor) -> Tensor:
        self.clips += 1
        self.grad |= torch.is_grad_enabled()
        means = video[:, :, ::4].unfold(3, 8, 8).unfold(4, 8, 8).mean((-1, -2))
        conv = self.conv_in.conv
        return F.conv3d(means, conv.weight.sum((2, 3, 4), keepdim=True), conv.bias)


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


def make_video(path: Path, frames: int, seed: int = 0) -> Path:
    noise = torch.rand(frames, 8, 8, 3, generator=torch.Generator().manual_seed(seed))
    image = noise.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    write_video(path, (image * 255).to(torch.uint8), Fraction(25))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos of 11, 5 and 14 frames: 2, 1 and 3 clips of five frames."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, frames in (("a", 11), ("b", 5), ("c", 15)):
        make_video(videos / f"{name}.mp4", frames, seed=frames)
    return videos


@pytest.fixture
def encode(folder: Path, tmp_path: Path, encoder: CountingEncoder) -> Encode:
    """`encode_videos` of the folder in clips of 5 frames, 2 a shard, unless told otherwise."""

    def run(paths: list[Path] | None = None, out: str | Path = tmp_path / "out", **settings: int) -> EncodeSummary:
        encoder.clips = 0
        return encode_videos(paths or [folder], encoder, out, **{"clip_frames": 5, "samples_per_shard": 2} | settings)

    return run


def shards(out: Path) -> list[list[Sample]]:
    return [list(read_shard(path)) for path in sorted(out.glob("*.tar"))]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def starts(out: Path) -> list[tuple[str, int]]:
    return [(Path(s.record.source).stem, s.record.first_frame) for shard in shards(out) for s in shard]


WHOLE = [("a", 0), ("a", 5), ("b", 0), ("c", 0), ("c", 5), ("c", 10)]


@pytest.mark.parametrize(
    ("frames", "clips"),
    [(5, [5]), (8, [5]), (9, [9]), (13, [9]), (14, [9, 5]), (17, [9, 5]), (18, [9, 9]), (23, [9, 9, 5])],
)
def test_video_is_cut_in_clips_and_a_tail_of_1_plus_4n_frames(
    tmp_path: Path, encoder: CountingEncoder, frames: int, clips: list[int]
) -> None:
    samples = encode_video(make_video(tmp_path / "v.mp4", frames), encoder, clip_frames=9)
    assert [sample.record.frames for sample in samples] == clips
    assert [sample.record.first_frame for sample in samples] == [sum(clips[:i]) for i in range(len(clips))]
    assert [sample.latent.shape[1] for sample in samples] == [1 + (count - 1) // 4 for count in clips]


def test_real_frames_give_the_encoders_latents(tmp_path: Path) -> None:
    path = tmp_path / "carphone.mp4"
    write_video(path, *read_video(clip_path("carphone_pristine"), 144, 176, max_frames=11))
    torch.manual_seed(0)
    encoder = HunyuanEncoder(VAEConfig(widths=(4, 4, 4, 4), groups=2, layers_per_block=1))
    samples = encode_video(path, encoder, clip_frames=5)
    frames, _ = read_video(path, 256, 256)
    with torch.inference_mode():
        expected = [encoder(to_model(frames[first : first + 5]))[0].half() for first in (0, 5)]
    assert all(torch.equal(sample.latent, latent) for sample, latent in zip(samples, expected, strict=True))
    assert samples[1].record == ClipRecord(5, 256, 256, Fraction(30000, 1001), str(path), first_frame=5)


def test_nearest_bucket_is_taken(tmp_path: Path, encoder: CountingEncoder) -> None:
    write_video(tmp_path / "v.mp4", torch.zeros(5, 128, 224, 3, dtype=torch.uint8), Fraction(25))
    (sample,) = encode_video(tmp_path / "v.mp4", encoder)
    assert (sample.record.height, sample.record.width, list(sample.latent.shape)) == (256, 384, [16, 2, 32, 48])


def test_latents_can_be_trained_on(tmp_path: Path, encoder: CountingEncoder) -> None:
    (sample,) = encode_video(make_video(tmp_path / "v.mp4", 5), encoder)
    assert sample.latent.dtype == torch.float16
    assert not sample.latent.is_inference()
    assert not encoder.grad


def test_encoder_keeps_its_dtype(tmp_path: Path, encoder: CountingEncoder) -> None:
    path = make_video(tmp_path / "v.mp4", 5)
    exact, rounded = encode_video(path, encoder)[0].latent, encode_video(path, encoder.bfloat16())[0].latent
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded.float(), exact.float(), rtol=0.1, atol=0.05)


def test_progress_tells_frames_done_and_announced(tmp_path: Path, encoder: CountingEncoder) -> None:
    path, calls = make_video(tmp_path / "v.mp4", 16), []
    encode_video(path, encoder, clip_frames=9, progress=lambda *call: calls.append(call))
    assert calls == [(str(path), 9, 16), (str(path), 14, 16)]


def test_no_frame_is_decoded_before_its_clip_is_due(
    tmp_path: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = []

    def counted(*arguments: Any, **settings: Any) -> Iterator[Tensor]:
        for number, frame in enumerate(decode(*arguments, **settings)):
            ahead.append(number - 5 * encoder.clips)
            yield frame

    monkeypatch.setattr("k5kernels.latents.encode.decode", counted)
    encode_video(make_video(tmp_path / "v.mp4", 25), encoder, clip_frames=5)
    assert ahead == [0, 1, 2, 3, 4] * 5


@pytest.mark.parametrize(("frames", "message"), [(1, "decoded 1"), (4, "decoded 4")])
def test_fewer_than_five_frames_are_refused(
    tmp_path: Path, encoder: CountingEncoder, frames: int, message: str
) -> None:
    with pytest.raises(VideoError, match=f"expected a video of at least 5 frames, {message}"):
        encode_video(make_video(tmp_path / "v.mp4", frames), encoder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_frames": 24}, r"expected 1 \+ a multiple of 4, got 24"),
        ({"clip_frames": 1}, "clip_frames: expected at least 5, got 1"),
        ({"resolution": 300}, "resolution: expected one of"),
        ({"samples_per_shard": 0}, "samples_per_shard: expected at least 1, got 0"),
        ({"max_clips": 0}, "max_clips: expected at least 1, or None for all, got 0"),
    ],
)
def test_settings_are_checked_before_any_work(encode: Encode, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(**settings)
    assert not (tmp_path / "out").exists()


def test_folder_becomes_shards(encode: Encode, tmp_path: Path) -> None:
    assert encode() == EncodeSummary(shards=3, samples=6, shards_kept=0, failures={})
    assert sorted(contents(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar", "manifest.json"]
    assert [len(shard) for shard in shards(tmp_path / "out")] == [2, 2, 2]
    assert starts(tmp_path / "out") == WHOLE
    keys = [sample.key for shard in shards(tmp_path / "out") for sample in shard]
    assert len(set(keys)) == len(keys)


def test_url_serves_as_folder(encode: Encode, tmp_path: Path) -> None:
    encode(out="memory://test_encode/out")
    assert encode(out="memory://test_encode/out").shards_kept == 3
    encode()
    for number in range(3):
        remote = [s.latent for s in read_shard(f"memory://test_encode/out/{number:05d}.tar")]
        local = [s.latent for s in read_shard(tmp_path / "out" / f"{number:05d}.tar")]
        assert all(torch.equal(a, b) for a, b in zip(remote, local, strict=True))


def test_second_run_encodes_nothing(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode(samples_per_shard=4)
    before = contents(tmp_path / "out")
    assert encode(samples_per_shard=4).shards_kept == 2
    assert encoder.clips == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("killed_at", range(6))
def test_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    encode: Encode, tmp_path: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch, killed_at: int
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
    (tmp_path / "out" / f"{killed_at // 2:05d}.tar.partial").write_bytes(b"half of a shard")
    assert encode().shards_kept == killed_at // 2
    assert encoder.clips == 6 - killed_at // 2 * 2
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_kill_between_shard_and_manifest_only_costs_that_shard(encode: Encode, tmp_path: Path) -> None:
    encode([tmp_path / "videos" / "a.mp4", tmp_path / "videos" / "b.mp4"])
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    encode()
    after = contents(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_bytes(before)
    assert encode().shards_kept == 1
    assert contents(tmp_path / "out") == after


def test_damaged_and_missing_shards_are_redone(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").write_bytes(before["00001.tar"][:-100])
    assert encode().shards_kept == 1
    assert encoder.clips == 4
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "00002.tar").unlink()
    assert encode().shards_kept == 2
    assert contents(tmp_path / "out") == before


def test_added_video_is_encoded_and_the_rest_stays(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder
) -> None:
    encode(samples_per_shard=4)
    make_video(folder / "d.mp4", 5, seed=7)
    assert encode(samples_per_shard=4) == EncodeSummary(shards=2, samples=7, shards_kept=1, failures={})
    assert encoder.clips == 3
    assert starts(tmp_path / "out") == [*WHOLE, ("d", 0)]


def test_removed_video_takes_its_shards_along(encode: Encode, folder: Path, tmp_path: Path) -> None:
    encode()
    (folder / "c.mp4").unlink()
    assert encode() == EncodeSummary(shards=2, samples=3, shards_kept=1, failures={})
    assert starts(tmp_path / "out") == WHOLE[:3]


def test_changed_video_is_encoded_anew(encode: Encode, folder: Path, tmp_path: Path) -> None:
    encode()
    before = shards(tmp_path / "out")
    make_video(folder / "b.mp4", 5, seed=99)
    assert encode().shards_kept == 1
    after = shards(tmp_path / "out")
    assert not torch.equal(after[1][0].latent, before[1][0].latent)
    assert torch.equal(after[1][1].latent, before[1][1].latent)


def test_of_each_video_the_first_clips_alone_can_be_taken(encode: Encode, tmp_path: Path) -> None:
    assert encode(max_clips=2).samples == len(starts(tmp_path / "out"))
    assert {start for _, start in starts(tmp_path / "out")} == {0, 5}
    assert encode(max_clips=2).shards_kept == encode(max_clips=2).shards
    assert encode().shards_kept == 0


def test_other_settings_or_weights_redo_everything(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode()
    assert encode(clip_frames=9).shards_kept == 0
    assert starts(tmp_path / "out") == [("a", 0), ("b", 0), ("c", 0), ("c", 9)]
    with torch.no_grad():
        encoder.conv_in.conv.bias.add_(1)
    assert encode(clip_frames=9).shards_kept == 0


def test_broken_videos_are_reported_and_the_others_encoded(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder
) -> None:
    (folder / "aa.mp4").write_text("not a video")
    make_video(folder / "bb.mp4", 1)
    missing = tmp_path / "missing.mp4"
    summary = encode([folder, missing])
    assert (summary.shards, summary.samples) == (3, 6)
    assert list(summary.failures) == [str(folder / "aa.mp4"), str(folder / "bb.mp4"), str(missing)]
    assert "at least 5 frames, decoded 1" in summary.failures[str(folder / "bb.mp4")]
    assert "no such file" in summary.failures[str(missing)]
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


def test_repaired_video_is_tried_again(encode: Encode, folder: Path, tmp_path: Path) -> None:
    (folder / "aa.mp4").write_text("not a video")
    encode()
    make_video(folder / "aa.mp4", 5)
    assert not encode().failures
    assert starts(tmp_path / "out") == [*WHOLE[:2], ("aa", 0), *WHOLE[2:]]


def test_nothing_but_broken_videos_gives_no_shard(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("not a video")
    summary = encode([tmp_path / "x.mp4"])
    assert (summary.shards, summary.samples, len(summary.failures)) == (0, 0, 1)


def test_full_disk_is_no_fault_of_a_video(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("k5kernels.latents.shards.write_whole", fail)
    with pytest.raises(OSError, match="No space left"):
        encode()


def test_shards_from_elsewhere_are_not_overwritten(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"expected an empty folder or one with manifest\.json, found only 00000\.tar"):
        encode()
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"settings": {}, "sources": [{}], "shards": []})])
def test_foreign_manifest_is_refused(encode: Encode, tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: expected one that"):
        encode()


def test_folders_stand_for_the_videos_in_them(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "more").mkdir()
    (folder / "more" / "D.MP4").touch()
    named = [str(folder / name) for name in ("c.mp4", "a.mp4", "b.mp4", "more/D.MP4")]
    assert find_videos([folder / "c.mp4", folder]) == named
    with pytest.raises(ValueError, match="expected video files or folders with some"):
        find_videos([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        find_videos([tmp_path / "empty"])
