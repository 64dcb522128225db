"""Frames as tensors: cut to a bucket, and between bytes and the range of the models."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from k5kernels.latents.video.errors import VideoError

# Sources that would be enlarged beyond this have no detail to learn from.
MAX_UPSCALE = 2.0


def fit_image(image: Tensor, height: int, width: int, path: str, max_upscale: float = MAX_UPSCALE) -> Tensor:
    """`fit` of one frame, uint8 [H, W, 3], of the file `path`.

    Raises VideoError where it would be enlarged too much.
    """
    rows, columns = image.shape[:2]
    if max(height / rows, width / columns) > max_upscale:
        least = f"{math.ceil(width / max_upscale)}×{math.ceil(height / max_upscale)}"
        raise VideoError(
            f"{path}: expected frames of at least {least} pixels for {width}×{height}, "
            f"got {columns}×{rows}; take a larger source or a lower resolution"
        )
    return fit(image[None], height, width)[0]


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
