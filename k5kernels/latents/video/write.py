"""Frames to video files (PyAV)."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from k5kernels.atomic import replacing
from k5kernels.latents.video.errors import VideoError


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
