"""A damaged video gives clips that hold together or is refused in one line, and a good one beside it comes through."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from many_cases import refusal, tally
from mutations import mutate_boxes, mutate_bytes

from k5kernels.latents.record import ClipRecord
from k5kernels.latents.video import Clip, read_clips

HEIGHT, WIDTH, FRAMES, CLIP_FRAMES = 128, 128, 10, 5
MOST_CLIPS = 50  # of a damaged video
NEIGHBOUR = 10  # the good video is read after each so many damaged ones
# Name of the file -> FFmpeg's names of the codec and of the pixels.
FORMATS = {
    "a.mp4": ("libx264", "yuv420p"),
    "b.mov": ("mpeg4", "yuv420p"),
    "c.mkv": ("libvpx-vp9", "yuv420p"),
    "d.webm": ("libvpx", "yuv420p"),
    "e.ts": ("mpeg2video", "yuv420p"),
    "f.avi": ("mjpeg", "yuvj420p"),
    "g.y4m": ("wrapped_avframe", "yuv420p"),
    "h.gif": ("gif", "rgb8"),
    "i.png": ("png", "rgb24"),
    "j.jpg": ("mjpeg", "yuvj420p"),
    "k.webp": ("libwebp", "yuv420p"),
}
PICTURES = (".png", ".jpg", ".webp")


def write(path: Path, codec: str, pixels: str) -> bytes:
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.gop_size = 4
        for number in range(1 if path.suffix in PICTURES else FRAMES):
            blocks = draw.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
            image = blocks.repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 24)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path.read_bytes()


def clips(path: Path) -> Iterator[Clip]:
    return read_clips(path, 256, CLIP_FRAMES)


@dataclass(frozen=True)
class DamagedVideo:
    """videos: good files by name, of which the first is the neighbour too. frames: uint8, of its clips."""

    videos: dict[str, bytes]
    frames: torch.Tensor

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        name = draw.choice(sorted(self.videos))
        path = folder / name
        path.write_bytes(draw.choice((mutate_bytes, mutate_boxes))(self.videos[name], draw))
        taken = 0

        def read() -> None:
            nonlocal taken
            # A damaged rate may make hours of a second: that is as the file says, and is read as far as that.
            for clip in islice(clips(path), MOST_CLIPS):
                self._check(clip, name)
                taken += 1

        refused = refusal(read, str(path))
        if case % NEIGHBOUR == 0:
            good = folder / f"good{Path(min(self.videos)).suffix}"
            good.write_bytes(self.videos[min(self.videos)])
            assert torch.equal(torch.cat([clip.frames for clip in clips(good)]), self.frames), "the neighbour is harmed"
        if refused is None:
            return "encoded"
        return "refused in one line after some clips" if taken else "refused in one line"

    def _check(self, clip: Clip, name: str) -> None:
        frames, height, width, channels = clip.frames.shape
        assert clip.frames.dtype == torch.uint8
        assert (min(height, width), channels) == (256, 3)
        assert frames <= CLIP_FRAMES
        ClipRecord(
            frames, height, width, clip.rate, name, clip.first_frame, start=clip.start, end=clip.end,
            shown_height=clip.shown_height, shown_width=clip.shown_width, colour=clip.colour,
        )  # fmt: skip


@pytest.fixture(scope="module")
def damaged_video(tmp_path_factory: pytest.TempPathFactory) -> DamagedVideo:
    folder = tmp_path_factory.mktemp("videos")
    videos = {name: write(folder / name, *settings) for name, settings in FORMATS.items()}
    return DamagedVideo(videos, torch.cat([clip.frames for clip in clips(folder / min(videos))]))


def test_undamaged_videos_are_encoded(damaged_video: DamagedVideo, tmp_path: Path) -> None:
    for name, data in damaged_video.videos.items():
        (tmp_path / name).write_bytes(data)
        taken = sum(len(clip.frames) for clip in clips(tmp_path / name))
        assert taken == (1 if Path(name).suffix in PICTURES else FRAMES), name


def test_a_rate_of_almost_nothing_holds_no_frame_without_end(damaged_video: DamagedVideo, tmp_path: Path) -> None:
    path = tmp_path / "f.avi"
    avi = damaged_video.videos["f.avi"]
    scale = avi.index(b"strh") + 28  # dwScale of the stream: its rate is dwRate / dwScale
    path.write_bytes(avi[:scale] + (2**31 - 1).to_bytes(4, "little") + avi[scale + 4 :])
    assert refusal(lambda: sum(len(clip.frames) for clip in clips(path)), str(path)) is not None


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_videos(damaged_video: DamagedVideo, count: int) -> None:
    counts = tally("videos", damaged_video, range(count))
    assert counts["encoded"] > 0
    assert counts["refused in one line"] > 0
