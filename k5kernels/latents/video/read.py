"""Video files to frames (PyAV).

Pixels are taken as square and rotation marks in a file are not applied.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from k5kernels.latents.video.errors import VideoError, translated
from k5kernels.latents.video.frames import fit

# Sources that would be enlarged beyond this have no detail to learn from.
MAX_UPSCALE = 2.0
DEFAULT_RATE = Fraction(24)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video stream: sides [pixels], rate [frames/s], frames (0 where it does not say)."""

    height: int
    width: int
    rate: Fraction
    frames: int


def probe(path: str | Path) -> VideoInfo:
    """What the file says of its first video stream, without decoding. Raises VideoError as `decode`."""
    with _open(path) as (_, stream):
        return VideoInfo(stream.height, stream.width, Fraction(stream.average_rate or DEFAULT_RATE), stream.frames)


def decode(
    path: str | Path, height: int, width: int, min_frames: int = 1, max_upscale: float = MAX_UPSCALE
) -> Iterator[Tensor]:
    """Frames one by one, uint8 [height, width, 3], cropped and resized as they are decoded.

    A stream may change its frame size on the way. max_upscale: how much larger than the source a frame may become.
    Raises VideoError where the file is missing or is not a video, is damaged or cut off (as far as the container
    tells: a Matroska file that ends early is a shorter video), has frames that are too small, or holds fewer than
    `min_frames`; OSError where the system does not let it be read.
    """
    count = 0
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        for packet in container.demux(stream):
            # A damaged packet is not decoded: that raises an error or not, by the number of threads.
            frames = [] if packet.is_corrupt else packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                raise VideoError(f"{path}: expected a whole video, found damaged or missing data after frame {count}")
            for frame in frames:
                if max(height / frame.height, width / frame.width) > max_upscale:
                    least = f"{math.ceil(width / max_upscale)}×{math.ceil(height / max_upscale)}"
                    raise VideoError(
                        f"{path}: expected frames of at least {least} pixels for {width}×{height}, "
                        f"got {frame.width}×{frame.height}; take a larger source or a lower resolution"
                    )
                yield fit(torch.from_numpy(frame.to_ndarray(format="rgb24"))[None], height, width)[0]
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
) -> tuple[Tensor, Fraction]:
    """The first `max_frames` frames (None: all), uint8 [F, height, width, 3], and the frame rate.

    Raises VideoError as `decode`, ValueError for `max_frames` below 1.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
    frames = list(islice(decode(path, height, width, min_frames, max_upscale), max_frames))
    return torch.stack(frames), probe(path).rate


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream; FFmpeg's errors inside the block are translated."""
    if not Path(path).is_file():
        found = "found a folder" if Path(path).is_dir() else "found no such file"
        raise VideoError(f"{path}: expected a video file, {found}")
    # An absolute path, because FFmpeg takes what stands before a colon for a protocol.
    with translated(path), av.open(str(Path(path).absolute()), metadata_errors="replace") as container:
        # FFmpeg plays text files as terminal art.
        if container.format.name == "tty" or not container.streams.video:
            raise VideoError(f"{path}: expected a video, found no video stream")
        stream = container.streams.video[0]
        if not stream.height or not stream.width:
            raise VideoError(f"{path}: expected a video, found a stream without a frame size")
        yield container, stream
