"""What the ffmpeg program makes of a file: the measure of what a player shows."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from k5kernels.latents.video import EVERY_FRAME, Reading
from k5kernels.latents.video.container import open_video
from k5kernels.latents.video.shown import Shown, shown_frames

# Difference of the means of one of 8×8 regions, of 255, that may lie between two conversions of one picture.
REGION_TOLERANCE = 5.0
SQUARE = "scale=w='round(iw*max(sar,1))':h='round(ih/min(sar,1))':flags=bicubic+accurate_rnd"


def ffmpeg(*arguments: str | Path) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def frames_of_ffmpeg(path: Path, height: int, width: int, filters: str = SQUARE, channels: int = 3) -> Tensor:
    """uint8 [F, height, width, channels]: every frame through these filters. The program turns pictures by itself."""
    layout = {3: "rgb24", 4: "rgba"}[channels]
    data = ffmpeg("-i", path, "-fps_mode", "passthrough", "-vf", filters, "-pix_fmt", layout, "-f", "rawvideo", "-")
    pixels = np.frombuffer(bytearray(data), np.uint8)
    assert pixels.size > 0
    assert pixels.size % (height * width * channels) == 0, "ffmpeg's frames have another size"
    return torch.from_numpy(pixels.reshape(-1, height, width, channels))


def read_shown(path: Path, reading: Reading = EVERY_FRAME) -> list[Shown]:
    with open_video(path) as video:
        return list(shown_frames(video, reading))


def images(shown: list[Shown]) -> Tensor:
    """uint8 [F, H, W, 3]."""
    return torch.stack([one.image for one in shown])


def assert_same_picture(actual: Tensor, expected: Tensor) -> None:
    """Means of 8×8 regions of every frame [F, H, W, 3] lie within the tolerance."""
    assert actual.shape == expected.shape
    means = [
        torch.nn.functional.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2).double(), 8) for frames in (actual, expected)
    ]
    worst = float((means[0] - means[1]).abs().max())
    assert worst <= REGION_TOLERANCE, f"means of regions differ by {worst:.1f} of 255"
