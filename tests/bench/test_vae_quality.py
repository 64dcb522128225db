"""Where diffusers averages tiles, by its own word."""

import pytest
import torch
from torch import nn

from bench.stock_vae import stock_vae
from bench.vae_quality import stock_overlaps
from k5kernels.vae import VAEConfig


class ANumberForEachTile(nn.Module):
    """Decodes a tile to a constant that no other tile has."""

    def __init__(self) -> None:
        super().__init__()
        self.random, self.drawn = torch.Generator().manual_seed(0), []

    def forward(self, latent):
        B, _, T, h, w = latent.shape
        self.drawn.append(torch.rand((), generator=self.random))
        return self.drawn[-1].expand(B, 3, 1 + 4 * (T - 1), 8 * h, 8 * w).clone()


@pytest.mark.parametrize("size", [(41, 256, 384), (33, 256, 256), (17, 200, 520)])
def test_overlaps_are_the_values_that_no_single_tile_gives(size):
    frames, height, width = size
    vae = stock_vae(VAEConfig(widths=(8, 8, 8, 8), groups=4))
    vae.decoder = ANumberForEachTile()
    with torch.no_grad():
        decoded = vae.decode(torch.zeros(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)).sample
    averaged = ~torch.isin(decoded[0, 0], torch.stack(vae.decoder.drawn))
    assert 0.1 < averaged.float().mean() < 0.9
    assert torch.equal(averaged, stock_overlaps(*size))
