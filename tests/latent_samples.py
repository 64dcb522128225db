"""Small latent samples for the training tests."""

import torch

from k5kernels.latents.shards import Sample


def sample(source: str, grid: tuple[int, int, int], first_frame: int = 0) -> Sample:
    """A latent filled with its first frame's number."""
    T, H, W = grid
    meta = {"frames": 4 * T - 3, "height": 8 * H, "width": 8 * W, "rate": "25", "source": source}
    latent = torch.full((16, *grid), float(first_frame), dtype=torch.float16)
    return Sample(f"{source[0]}-{first_frame}", latent, meta | {"first_frame": first_frame})
