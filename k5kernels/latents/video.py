"""Video files in and out (PyAV), and the resolution buckets of pre-training (Table 4).

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
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from k5kernels.atomic import replacing

# height x width, by the short side's class; Table 4 of the report.
BUCKETS: dict[int, tuple[tuple[int, int], ...]] = {
    256: ((256, 256), (256, 384), (384, 256)),
    512: ((512, 512), (512, 768), (768, 512)),
    1024: ((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152)),
}
# Sources that would be enlarged beyond this have no detail to learn from.
MAX_UPSCALE = 2.0
DEFAULT_RATE = Fraction(24)


class VideoError(ValueError):
    """A file that is not a video we can use, or one we cannot write; the message says what would do."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video stream: sides [pixels], rate [frames/s], frames (0 where it does not say)."""

    height: int
    width: int
    rate: Fraction
    frames: int


def nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) of the bucket of that class whose aspect ratio is nearest, by ratio.

    Raises ValueError for a resolution without buckets and for sides below 1.
    """
    if resolution not in BUCKETS:
        raise ValueError(f"resolution: expected one of {sorted(BUCKETS)}, got {resolution}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width: expected at least 1 pixel, got {height}×{width}")
    return min(BUCKETS[resolution], key=lambda side: abs(math.log(side[0] / side[1] * width / height)))


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """Centre-crop uint8 frames [F, H, W, 3] to the aspect ratio and resize them to [F, height, width, 3]."""
    rows, columns = frames.shape[1:3]
    scale = min(rows / height, columns / width)
    crop_height, crop_width = round(height * scale), round(width * scale)
    top, left = (rows - crop_height) // 2, (columns - crop_width) // 2
    crop = frames[:, top : top + crop_height, left : left + crop_width].permute(0, 3, 1, 2)
    resized = F.interpolate(crop, size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


def to_model(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] to float32 [1, 3, F, H, W] in [-1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """float [1, 3, F, H, W] in [-1, 1] to uint8 [F, H, W, 3]; values outside are clamped."""
    return ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


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
    `min_frames`.
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


def write_video(path: str | Path, frames: Tensor, rate: Fraction) -> None:
    """Write frames, uint8 [F, H, W, 3] with even sides, as H.264 in MP4, whole or not at all.

    Raises ValueError for other frames, VideoError where the file cannot be written (no folder, disk full).
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8 or 0 in frames.shape:
        raise ValueError(f"frames: expected uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames: expected even sides (4:2:0 colour), got {list(frames.shape[1:3])}")
    try:
        with replacing(path) as partial, av.open(str(partial.absolute()), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            for image in frames.cpu().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: the video could not be written ({error.strerror or error})") from error


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream; FFmpeg's errors inside the block become VideoError."""
    if not Path(path).is_file():
        found = "found a folder" if Path(path).is_dir() else "found no such file"
        raise VideoError(f"{path}: expected a video file, {found}")
    try:
        # An absolute path, because FFmpeg takes what stands before a colon for a protocol.
        with av.open(str(Path(path).absolute())) as container:
            # FFmpeg plays text files as terminal art.
            if container.format.name == "tty" or not container.streams.video:
                raise VideoError(f"{path}: expected a video, found no video stream")
            stream = container.streams.video[0]
            if not stream.height or not stream.width:
                raise VideoError(f"{path}: expected a video, found a stream without a frame size")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: expected a readable video file ({error.strerror or error})") from error
