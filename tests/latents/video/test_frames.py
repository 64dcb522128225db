"""Frames as tensors: cropped, resized, and in the range of the models."""

import torch

from k5kernels.latents.video import fit, to_frames, to_model
from tests.latents.video_files import moving_gradient


def test_crop_is_centred() -> None:
    frames = torch.zeros(1, 40, 100, 3, dtype=torch.uint8)
    frames[:, :, 30:70] = 200
    assert (fit(frames, 20, 20) == 200).all()
    assert (fit(frames.transpose(1, 2), 20, 20) == 200).all()


def test_same_size_is_untouched() -> None:
    frames = moving_gradient(2, 24, 40)
    assert torch.equal(fit(frames, 24, 40), frames)


def test_model_range_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    video = to_model(frames)
    assert video.shape == (1, 3, 2, 16, 16)
    assert (float(video.min()), float(video.max())) == (-1.0, 1.0)
    assert torch.equal(to_frames(video), frames)
    assert torch.equal(to_frames(video * 3), to_frames((video * 3).clamp(-1, 1)))
