"""Video files to frames: what comes back, and one clear line for every file that will not do."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from k5kernels.latents.video import VideoError, decode, fit, probe, read_video, write_video
from tests.latents.video_files import RATE, moving_gradient, remux, write_sound


def test_what_is_written_reads_back(video: Path) -> None:
    frames, rate = read_video(video, 64, 96)
    assert frames.shape == (12, 64, 96, 3)
    assert frames.dtype == torch.uint8
    assert rate == RATE
    assert (frames.float() - moving_gradient(12, 64, 96).float()).abs().mean() < 3


def test_probe_tells_sides_rate_and_frames(video: Path) -> None:
    info = probe(video)
    assert (info.height, info.width, info.rate, info.frames) == (64, 96, RATE, 12)


def test_only_the_frames_asked_for_are_read(video: Path) -> None:
    frames, _ = read_video(video, 64, 96, max_frames=5)
    assert torch.equal(frames, read_video(video, 64, 96)[0][:5])
    with pytest.raises(ValueError, match="max_frames: expected at least 1, got 0"):
        read_video(video, 64, 96, max_frames=0)


def test_frames_are_decoded_one_by_one(video: Path) -> None:
    frames = decode(video, 32, 32)
    assert next(frames).shape == (32, 32, 3)
    assert sum(1 for _ in frames) == 11


def test_decoding_equals_fitting_the_whole(video: Path) -> None:
    whole = fit(read_video(video, 64, 96)[0], 32, 32)
    assert torch.equal(read_video(video, 32, 32)[0], whole)


def test_frames_may_change_their_size_on_the_way(tmp_path: Path) -> None:
    parts = []
    for number, (height, width) in enumerate([(64, 96), (96, 64)]):
        write_video(tmp_path / "part.mp4", moving_gradient(6, height, width), Fraction(25))
        remux(tmp_path / "part.mp4", tmp_path / f"{number}.h264")
        parts.append((tmp_path / f"{number}.h264").read_bytes())
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    assert read_video(tmp_path / "both.h264", 48, 48)[0].shape == (12, 48, 48, 3)


def test_odd_names_are_no_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("concat:a b%03d.mp4", moving_gradient(2, 16, 16), RATE)
    assert len(read_video("concat:a b%03d.mp4", 16, 16)[0]) == 2


def truncate(path: Path, part: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def make_folder(path: Path, video: Path) -> None:
    path.mkdir()


def make_empty(path: Path, video: Path) -> None:
    path.touch()


def make_text(path: Path, video: Path) -> None:
    path.write_text("Not a video.\n" * 100)


def make_sound(path: Path, video: Path) -> None:
    write_sound(path)


def make_without_index(path: Path, video: Path) -> None:
    path.write_bytes(video.read_bytes())
    truncate(path, 0.7)


def make_cut(path: Path, video: Path) -> None:
    remux(video, path, movflags="faststart")
    truncate(path, 0.8)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("folder.mp4", make_folder, "expected a video file, found a folder"),
        ("empty.mp4", make_empty, "expected a readable video file"),
        ("text.mp4", make_text, "expected a readable video file"),
        ("text.txt", make_text, "expected a readable video file"),
        ("sound.wav", make_sound, "expected a video, found no video stream"),
        ("half.mp4", make_without_index, "expected a readable video file|found no video stream"),
        ("cut.mp4", make_cut, "expected a whole video, found damaged or missing data after frame"),
    ],
)
def test_file_that_is_no_whole_video_is_refused_in_one_line(
    video: Path, tmp_path: Path, name: str, make: Callable[[Path, Path], None], message: str
) -> None:
    path = tmp_path / name
    make(path, video)
    with pytest.raises(VideoError, match=message) as caught:
        read_video(path, 64, 96)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_data_is_refused(video: Path, tmp_path: Path) -> None:
    remux(video, tmp_path / "video.mkv")
    data = bytearray((tmp_path / "video.mkv").read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    (tmp_path / "video.mkv").write_bytes(data)
    with pytest.raises(VideoError, match="expected a"):
        read_video(tmp_path / "video.mkv", 64, 96)


def test_source_is_enlarged_twice_at_most(video: Path) -> None:
    assert read_video(video, 128, 192, max_frames=1)[0].shape == (1, 128, 192, 3)
    with pytest.raises(VideoError, match="expected frames of at least 97×65 pixels for 194×130, got 96×64"):
        read_video(video, 130, 194)
    assert read_video(video, 256, 384, max_frames=1, max_upscale=math.inf)[0].shape == (1, 256, 384, 3)


def test_too_few_frames_are_counted(video: Path) -> None:
    assert len(read_video(video, 64, 96, min_frames=12)[0]) == 12
    with pytest.raises(VideoError, match="expected a video of at least 13 frames, decoded 12"):
        read_video(video, 64, 96, min_frames=13)


@pytest.mark.parametrize("frames", [1, 2])
def test_short_videos_are_whole_too(tmp_path: Path, frames: int) -> None:
    write_video(tmp_path / "short.mp4", moving_gradient(frames, 16, 16), RATE)
    assert len(read_video(tmp_path / "short.mp4", 16, 16)[0]) == frames
