"""A file cut in clips: where they end, and that what is said of each is true of the frames in it."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from k5kernels.latents.video import EVERY_FRAME, Reading, VideoError, read_clips
from tests.latents.video.containers import Container, number_of, still, write_container, write_joined
from tests.latents.video.ffmpeg_program import ffmpeg, frames_of_ffmpeg, read_shown

SQUARE = Container(128, 128)
VARIABLE = (0, Fraction(2, 5), Fraction(4, 5), Fraction(6, 5), Fraction(8, 5), 6, 12, 14, 16, 18)


def numbers(path: Path, clip_frames: int = 5, reading: Reading = EVERY_FRAME) -> list[list[int]]:
    """Which frames every clip holds."""
    return [[number_of(image) for image in clip.frames] for clip in read_clips(path, 256, clip_frames, reading)]


@pytest.mark.parametrize(
    ("frames", "clip_frames", "expected"),
    [
        (15, 5, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]),
        (12, 9, [[0, 1, 2, 3, 4, 5, 6, 7, 8]]),
        (14, 9, [[0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]),
        (8, 9, [[0, 1, 2, 3, 4]]),
        (3, 1, [[0], [1], [2]]),
    ],
)
def test_clips_follow_one_another(tmp_path: Path, frames: int, clip_frames: int, expected: list[list[int]]) -> None:
    assert numbers(write_container(tmp_path / "v.mp4", replace(SQUARE, frames=frames)), clip_frames) == expected


def test_a_break_ends_a_clip_and_not_the_video(tmp_path: Path) -> None:
    parts = [replace(SQUARE, frames=7), replace(SQUARE, frames=4), Container(128, 192, 9, first_frame=3)]
    path = write_joined(tmp_path / "v.ts", parts)
    clips = list(read_clips(path, 256, 5, EVERY_FRAME))
    assert numbers(path) == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    assert [clip.first_frame for clip in clips] == [0, 11]
    assert [(clip.shown_height, clip.shown_width) for clip in clips] == [(128, 128), (128, 192)]
    assert [clip.frames.shape[1:3] for clip in clips] == [(256, 256), (256, 384)]
    assert [clip.end - clip.start for clip in clips] == [Fraction(5, 24)] * 2


def test_a_hole_in_a_transport_stream_is_a_break(tmp_path: Path) -> None:
    stamps = (*range(7), *range(100, 106))
    path = write_container(tmp_path / "v.ts", replace(SQUARE, stamps=stamps, options=(("g", "1"),)))
    assert numbers(path) == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    path = write_container(tmp_path / "v.mkv", replace(SQUARE, stamps=stamps))
    assert numbers(path) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60)])
@pytest.mark.parametrize("format", ["mp4", "mkv", "avi", "ts"])
def test_rate_and_span_of_an_even_video_are_exact(tmp_path: Path, format: str, rate: Fraction) -> None:
    codec = "mpeg4" if format == "avi" else "libx264"
    path = write_container(tmp_path / f"v.{format}", replace(SQUARE, frames=10, rate=rate, codec=codec))
    for number, clip in enumerate(read_clips(path, 256, 5, EVERY_FRAME)):
        assert clip.rate == rate
        assert abs(clip.start - 5 * number / rate) <= Fraction(1, 1000)
        assert abs(clip.end - 5 * (number + 1) / rate) <= Fraction(1, 1000)


def test_rate_of_a_variable_video_is_that_of_its_frames(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.mp4", replace(SQUARE, stamps=VARIABLE))
    fast, slow = read_clips(path, 256, 5, EVERY_FRAME)
    assert (fast.start, fast.end) == (0, Fraction(6, 24))
    assert fast.rate == pytest.approx(Fraction(20))
    assert slow.start == Fraction(6, 24)
    assert slow.rate == pytest.approx(5 / float(slow.end - slow.start), rel=1e-4)


def test_resampled_clips_say_the_rate_asked_for(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.mp4", replace(SQUARE, stamps=VARIABLE))
    clips = list(read_clips(path, 256, 5, Reading(fps=Fraction(24))))
    shown = [number_of(image) for image in frames_of_ffmpeg(path, 128, 128, "fps=24")]
    assert [number_of(image) for clip in clips for image in clip.frames] == shown[: 5 * len(clips)]
    for number, clip in enumerate(clips):
        assert (clip.rate, clip.start, clip.end) == (24, Fraction(5 * number, 24), Fraction(5 * number + 5, 24))


@pytest.mark.parametrize("reading", [EVERY_FRAME, Reading()])
def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path, reading: Reading) -> None:
    path = write_container(tmp_path / "p.png", still("png", "rgb24", height=128, width=192))
    (clip,) = read_clips(path, 256, 25, reading)
    assert clip.frames.shape == (1, 256, 384, 3)
    assert (clip.rate, clip.shown_height, clip.shown_width, clip.colour) == (None, 128, 192, "RGB")


def test_bucket_and_record_go_by_the_size_shown(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.mp4", Container(128, 192, 5, rotation=90))
    (clip,) = read_clips(path, 256, 5, EVERY_FRAME)
    assert clip.frames.shape[1:3] == (384, 256)
    assert (clip.shown_height, clip.shown_width) == (192, 128)
    path = write_container(tmp_path / "w.mp4", Container(192, 192, 5, aspect=Fraction(2, 3)))
    (clip,) = read_clips(path, 256, 5, EVERY_FRAME)
    assert (clip.shown_height, clip.shown_width) == (288, 192)
    assert clip.frames.shape[1:3] == (384, 256)


@pytest.mark.parametrize(("rotation", "shape"), [(0, (64, 128, 3)), (90, (128, 64, 3))])
def test_the_containers_aspect_goes_before_the_codecs(
    tmp_path: Path, rotation: int, shape: tuple[int, int, int]
) -> None:
    write_container(tmp_path / "v.mp4", Container(frames=2, rotation=rotation))
    ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", "-aspect", "2", tmp_path / "w.mov")
    assert read_shown(tmp_path / "w.mov")[0].image.shape == shape


def test_an_edit_list_is_followed(tmp_path: Path) -> None:
    write_container(tmp_path / "v.mp4", replace(SQUARE, frames=12))
    ffmpeg("-ss", "0.2", "-i", tmp_path / "v.mp4", "-c", "copy", tmp_path / "w.mp4")
    shown = read_shown(tmp_path / "w.mp4")
    expected = [number_of(image) for image in frames_of_ffmpeg(tmp_path / "w.mp4", 128, 128)]
    assert [number_of(one.image) for one in shown] == expected
    assert expected[0] > 0
    assert shown[0].start <= Fraction(1, 24)


def test_what_is_too_short_for_a_clip_is_told(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.mp4", replace(SQUARE, frames=4))
    with pytest.raises(VideoError, match="expected a video of at least 5 frames, decoded 4"):
        list(read_clips(path, 256, 25, EVERY_FRAME))
    path = write_joined(tmp_path / "v.ts", [replace(SQUARE, frames=4)] * 3)
    with pytest.raises(VideoError, match="expected at least 5 frames without a break, found 4 of 12"):
        list(read_clips(path, 256, 25, EVERY_FRAME))
