"""A video to samples: its clips, their records, and what the encoder is given."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding_jobs import CountingEncoder, make_video

from k5kernels.latents.encode import Encoding, encode_video
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.sources import Source, content_hash
from k5kernels.latents.video import BUCKETS, EVERY_FRAME, VideoError, read_video, to_model, write_video
from k5kernels.latents.video.shown import Shown, shown_frames
from k5kernels.vae import HunyuanEncoder, VAEConfig
from k5kernels.vae.plan import Mode
from tests.tolerances import assert_matches
from train.clips import clip_path


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


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
    samples = encode_video(path, encoder, clip_frames=5, reading=EVERY_FRAME)
    frames, _ = read_video(path, 256, 256)
    with torch.inference_mode():
        expected = [encoder(to_model(frames[first : first + 5]))[0].half() for first in (0, 5)]
    for sample, latent in zip(samples, expected, strict=True):
        assert_matches(sample.latent, latent)


@pytest.mark.parametrize(("mode", "count"), [("exact", 9), ("stream", 37), ("tile", 21)])
def test_the_mode_and_its_budget_are_the_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, count: int
) -> None:
    monkeypatch.setitem(BUCKETS, 64, ((64, 64),))
    torch.manual_seed(0)
    encoder = HunyuanEncoder(VAEConfig(widths=(4, 4, 4, 4), groups=2, layers_per_block=1))
    path = make_video(tmp_path / "v.mp4", count)
    frames, _ = read_video(path, 64, 64)
    (sample,) = encode_video(path, encoder, resolution=64, clip_frames=count, mode=mode, memory_budget=2**30)
    posterior = encoder.encode(to_model(frames), mode, 2**30)
    assert torch.equal(sample.latent, (posterior.mode() * encoder.config.scaling_factor)[0].half())


def test_record_tells_what_was_encoded(tmp_path: Path, encoder: CountingEncoder) -> None:
    path = make_video(tmp_path / "v.mp4", 11)
    source = Source(str(path), "scenes/v.mp4")
    encoding = Encoding(encoder, clip_frames=5)
    _, clip = encoding.clips(source.file)
    sample = encoding.sample(source, content_hash(str(path)), clip, caption="noise")
    expected = ClipRecord(
        5,
        256,
        256,
        Fraction(24),
        "scenes/v.mp4",
        5,
        content_hash(str(path)),
        caption="noise",
        start=Fraction(5, 24),
        end=Fraction(10, 24),
        shown_height=128,
        shown_width=128,
        colour="BT.601 (assumed) limited range",
    )
    assert sample.record == expected


def test_keys_tell_sources_of_one_name_or_one_content_apart(tmp_path: Path, encoder: CountingEncoder) -> None:
    path = make_video(tmp_path / "v.mp4", 5)
    sources = [("one/v.mp4", "0" * 64), ("two/v.mp4", "0" * 64), ("one/v.mp4", "1" * 64), ("caf\udce9/v.mp4", "1" * 64)]
    encoding = Encoding(encoder)
    given = [(Source(str(path), name), content) for name, content in sources]
    keys = [encoding.sample(source, content, next(encoding.clips(source.file))).key for source, content in given]
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("v-") for key in keys)


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


def test_latents_that_are_not_finite_are_the_videos_fault(tmp_path: Path, encoder: CountingEncoder) -> None:
    with torch.no_grad():
        encoder.conv_in.conv.bias.fill_(1e6)  # beyond float16
    with pytest.raises(VideoError, match=r"v\.mp4: expected clips that are encoded to finite latents, .* frame 0 on"):
        encode_video(make_video(tmp_path / "v.mp4", 5), encoder)


def test_no_frame_is_decoded_before_its_clip_is_due(
    tmp_path: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = []

    def counted(*arguments: Any) -> Iterator[Shown]:
        for number, frame in enumerate(shown_frames(*arguments)):
            ahead.append(number - 5 * encoder.clips)
            yield frame

    monkeypatch.setattr("k5kernels.latents.video.clips.shown_frames", counted)
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
        ({"clip_frames": -3}, r"expected 1 \+ a multiple of 4, got -3"),
        ({"resolution": 300}, "resolution: expected one of"),
        ({"mode": "fast"}, "mode: expected one of exact, stream, tile, got 'fast'"),
        ({"memory_budget": 1}, "memory_budget: expected at least"),
        ({"max_clips": 0}, "max_clips: expected at least 1, or None for all, got 0"),
    ],
)
def test_settings_are_checked(encoder: CountingEncoder, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(encoder, **settings)
