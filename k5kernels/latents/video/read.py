"""Video files to frames of one size."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.latents.video.container import open_video
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.frames import MAX_UPSCALE, fit_image
from k5kernels.latents.video.reading import EVERY_FRAME, Reading
from k5kernels.latents.video.shown import shown_frames


@dataclass(frozen=True)
class VideoInfo:
    """A video as it is shown: sides [pixels], rate [frames/s], frames at that rate (0 where the file does not say)."""

    height: int
    width: int
    rate: Fraction
    frames: int


def probe(path: str | Path, reading: Reading = EVERY_FRAME) -> VideoInfo:
    """What the first frame and the file's header say. Raises VideoError and OSError as `decode`."""
    with open_video(path) as video:
        shown = next(shown_frames(video, reading), None)
        if shown is None:
            raise VideoError(f"{path}: expected a video of at least 1 frame, decoded 0")
        height, width = shown.image.shape[:2]
        return VideoInfo(height, width, reading.fps or video.rate, video.announced_frames(reading.fps))


def decode(
    path: str | Path,
    height: int,
    width: int,
    min_frames: int = 1,
    max_upscale: float = MAX_UPSCALE,
    reading: Reading = EVERY_FRAME,
) -> Iterator[Tensor]:
    """Frames one by one as a player shows them, uint8 [height, width, 3], cropped and resized as they are decoded.

    A stream may change its frame size on the way. max_upscale: how much larger than the source a frame may become.
    Raises VideoError where the file is not a video, is damaged or cut off (as far as the container tells: a Matroska
    file that ends early is a shorter video), has frames that are too small or of a colour that cannot be converted,
    or holds fewer than `min_frames`; OSError where the system does not let it be read.
    """
    count = 0
    with open_video(path) as video:
        for shown in shown_frames(video, reading):
            yield fit_image(shown.image, height, width, str(path), max_upscale)
            count += 1
    if count < min_frames:
        raise VideoError(f"{path}: expected a video of at least {min_frames} frames, decoded {count}")


def read_video(
    path: str | Path,
    height: int,
    width: int,
    max_frames: int | None = None,
    min_frames: int = 1,
    max_upscale: float = MAX_UPSCALE,
    reading: Reading = EVERY_FRAME,
) -> tuple[Tensor, Fraction]:
    """The first `max_frames` frames (None: all), uint8 [F, height, width, 3], and the frame rate.

    Raises VideoError and OSError as `decode`, ValueError for `max_frames` below 1.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
    frames = list(islice(decode(path, height, width, min_frames, max_upscale, reading), max_frames))
    return torch.stack(frames), probe(path, reading).rate
