"""Small latent samples for the training tests."""

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample


def sample(
    source: str, grid: tuple[int, int, int], first_frame: int = 0, tensors: Mapping[str, Tensor] | None = None
) -> Sample:
    """A latent filled with its first frame's number."""
    T, H, W = grid
    record = ClipRecord(4 * T - 3, 8 * H, 8 * W, Fraction(25), source, first_frame)
    latent = torch.full((16, *grid), float(first_frame), dtype=torch.float16)
    return Sample(f"{source[0]}-{first_frame}", latent, record, tensors or {})
