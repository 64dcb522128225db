"""Frames to video files: whole or not at all, and one clear line for what cannot be written."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k5kernels.latents.video import VideoError, write_video
from tests.latents.video_files import RATE, moving_gradient


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 16, 16, 3), r"expected uint8 \[F, H, W, 3\], got torch.float32"),
        (torch.zeros(0, 16, 16, 3, dtype=torch.uint8), r"got torch.uint8 \[0, 16, 16, 3\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"got torch.uint8 \[2, 3, 16, 16\]"),
        (torch.zeros(2, 15, 16, 3, dtype=torch.uint8), r"expected even sides \(4:2:0 colour\), got \[15, 16\]"),
    ],
)
def test_frames_to_write_are_checked(tmp_path: Path, frames: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "video.mp4", frames, RATE)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"could not be written \(No such file or directory\)"):
        write_video(tmp_path / "nowhere" / "video.mp4", moving_gradient(2, 16, 16), RATE)


@contextmanager
def disk_of_4_kib() -> Iterator[None]:
    """Files cannot grow beyond 4 KiB: the error of a full disk, but for its number.

    Around the write alone: the test run's own output may be a file that is longer already.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    noise = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VideoError, match=r"video\.mp4: the video could not be written"), disk_of_4_kib():
        write_video(tmp_path / "video.mp4", noise, RATE)
    assert not list(tmp_path.iterdir())


def test_interrupted_write_keeps_the_former_file(video: Path) -> None:
    before = video.read_bytes()

    class Interrupted(Tensor):
        def cpu(self) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(video, moving_gradient(2, 16, 16).as_subclass(Interrupted), RATE)
    assert video.read_bytes() == before
    assert [file.name for file in video.parent.iterdir()] == [video.name]
