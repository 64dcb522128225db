"""`HunyuanDecoder.decode`: exact equals untiled, all modes give every frame and pixel, odd sizes are cut back."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from vae_models import relative_error

from k5kernels.vae import HunyuanDecoder, HunyuanEncoder
from k5kernels.vae.tiling import KANDINSKY_TILING, Tiling

pytestmark = pytest.mark.usefixtures("without_gradients")

MODES = ("exact", "stream", "tile")


@pytest.fixture(scope="module")
def decoder(tiny_vae: AutoencoderKLHunyuanVideo) -> HunyuanDecoder:
    return HunyuanDecoder.from_diffusers(tiny_vae)


def random_latent(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 3), (2, 16, 3, 3, 2), (1, 16, 7, 2, 2)])
@pytest.mark.parametrize("memory_budget", [None, 400_000])
def test_exact_is_untiled_diffusers_within_any_budget(tiny_vae_float64, decoder, shape, memory_budget):
    latent = random_latent(*shape)
    expected = tiny_vae_float64.decode(latent.double()).sample
    assert relative_error(decoder.decode(latent, "exact", memory_budget), expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frames", [1, 2, 12])
def test_every_mode_gives_every_frame_and_pixel(decoder, mode, frames):
    video = decoder.decode(random_latent(1, 16, frames, 2, 3), mode)
    assert video.shape == (1, 3, 1 + 4 * (frames - 1), 16, 24)
    assert (video != 0).all()


def test_tiles_are_diffusers_whole_decoder_on_each_of_them(tiny_vae_float64, decoder):
    latent = random_latent(1, 16, 9, 2, 2)
    tiles = (latent[:, :, start : start + 5].double() for start in (0, 4))
    first, second = (tiny_vae_float64.decode(tile).sample for tile in tiles)
    assert relative_error(decoder.decode(latent, "tile"), torch.cat([first, second[:, :, 1:]], dim=2)) < 1e-5


def test_tiles_that_fade_fade_frame_by_frame(tiny_vae_float64, decoder):
    latent = random_latent(1, 16, 7, 2, 2)
    tiles = (latent[:, :, start : start + 5].double() for start in (0, 2))
    first, second = (tiny_vae_float64.decode(tile).sample for tile in tiles)
    share = (torch.arange(8) / 8)[:, None, None]
    both = first[:, :, 9:] * (1 - share) + second[:, :, 1:9] * share
    expected = torch.cat([first[:, :, :9], both, second[:, :, 9:]], dim=2)
    assert relative_error(decoder.decode(latent, "tile", tiling=KANDINSKY_TILING), expected) < 1e-5


def test_tiles_in_space_cover_the_frame(decoder):
    latent = random_latent(1, 16, 1, 2, 24)
    tiling = Tiling(overlap=16, blend=True)
    budget = decoder.plan((1, 16, 1, 2, 10), "tile").peak_bytes
    assert len(decoder.plan(latent.shape, "tile", budget, tiling=tiling).columns) > 1
    video = decoder.decode(latent, "tile", budget, tiling=tiling)
    assert video.shape == (1, 3, 1, 16, 192)
    assert (video != 0).all()


def test_a_video_of_any_size_comes_back_in_its_size(tiny_vae, decoder):
    video = torch.rand(1, 3, 5, 19, 21, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = HunyuanEncoder.from_diffusers(tiny_vae).encode(video).mode()
    assert decoder.decode(latent, size=(19, 21)).shape == video.shape


@pytest.mark.parametrize(
    ("shape", "arguments", "expected"),
    [
        ((16, 1, 2, 2), {}, r"expected \[B, 16, T, h, w\], got \[16, 1, 2, 2\]"),
        ((1, 16, 1, 2, 2), {"size": (24, 16)}, r"size: expected one of a latent of \[2, 2\], got \[24, 16\]"),
        ((1, 16, 1, 2, 2), {"mode": "whole"}, "mode: expected one of exact, stream, tile"),
    ],
)
def test_what_does_not_fit_is_refused(decoder, shape, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        decoder.decode(torch.zeros(shape), **arguments)
