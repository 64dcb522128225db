"""Nothing of a clip is left out: every pixel reaches the latent, every latent reaches the video, at every size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vae_models import TINIEST, diffusers_vae

from k5kernels.latents.video import BUCKETS
from k5kernels.vae import KANDINSKY_TILING, HunyuanDecoder, HunyuanEncoder, Tiling
from k5kernels.vae.coding import chunks_of, fill_up, run_plan

MODES = ("exact", "stream", "tile")
TABLE_2 = [size for sizes in BUCKETS.values() for size in sizes]
TILINGS = {"default": Tiling(), "blended": Tiling(blend=True), "Kandinsky": KANDINSKY_TILING}


@pytest.fixture(scope="module")
def encoder() -> HunyuanEncoder:
    return HunyuanEncoder.from_diffusers(diffusers_vae(TINIEST))


@pytest.fixture(scope="module")
def decoder() -> HunyuanDecoder:
    return HunyuanDecoder.from_diffusers(diffusers_vae(TINIEST))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_all_matter(inputs: Tensor, outputs: Tensor) -> None:
    """Every position of the inputs [B, C, T, H, W] moves the outputs, none thousands of times less than the others."""
    (grad,) = torch.autograd.grad((outputs * random(*outputs.shape)).sum(), inputs)
    influence = grad.square().sum(dim=1)
    assert influence.min() > 1e-3**2 * influence.median()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 8, 24), (5, 19, 16), (29, 16, 41), (37, 24, 8)])
def test_every_pixel_reaches_the_latent(encoder, mode, frames, height, width):
    video = random(1, 3, frames, height, width).requires_grad_()
    plan = encoder.plan(video.shape, mode)
    moments = run_plan(plan, encoder.steps(), fill_up(video), encoder.run_tile)
    assert moments.shape == (1, 32, 1 + (frames - 1) // 4, -(-height // 8), -(-width // 8))
    assert_all_matter(video, moments[:, :16])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 3), (3, 2, 2), (10, 2, 1)])
def test_every_latent_reaches_the_video(decoder, mode, frames, height, width):
    latent = random(1, 16, frames, height, width).requires_grad_()
    video = run_plan(decoder.plan(latent.shape, mode), decoder.steps(), latent, decoder.run_tile)
    assert video.shape == (1, 3, 1 + 4 * (frames - 1), 8 * height, 8 * width)
    assert_all_matter(latent, video)


def pooled(video: Tensor) -> Tensor:
    """Latents that are the means of their pixels: what an encoder has of a tile where nothing but place matters."""
    return torch.cat([F.avg_pool3d(video[:, :, :1], (1, 8, 8)), F.avg_pool3d(video[:, :, 1:], (4, 8, 8))], dim=2)


def copied(latent: Tensor) -> Tensor:
    """Video whose pixels are copies of their latents."""
    in_space = latent.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
    return torch.cat([in_space[:, :, :1], in_space[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(("height", "width"), TABLE_2, ids=str)
def test_tiles_of_every_size_of_the_report_join_to_the_whole(tiling, height, width):
    """A latent that lacked a pixel, or had one twice, would not be the mean of its pixels."""
    with torch.device("meta"):
        encoder, decoder = HunyuanEncoder(), HunyuanDecoder()
    frames = 37 if height * width <= 512 * 512 else 5
    video, given = random(1, 1, frames, height, width), {"tiling": TILINGS[tiling]}
    whole = pooled(video)
    for budget in (None, encoder.plan((1, 3, *video.shape[2:]), "tile", **given).peak_bytes // 2):
        plan = encoder.plan((1, 3, *video.shape[2:]), "tile", budget, **given)
        assert budget is None or len(plan.rows) * len(plan.columns) > 1
        torch.testing.assert_close(run_plan(plan, [], video, pooled), whole)
    for budget in (None, decoder.plan((1, 16, *whole.shape[2:]), "tile", **given).peak_bytes // 2):
        plan = decoder.plan((1, 16, *whole.shape[2:]), "tile", budget, **given)
        torch.testing.assert_close(run_plan(plan, [], whole, copied), copied(whole))


@pytest.mark.parametrize("mode", ["exact", "stream"])
@pytest.mark.parametrize("frames", [1, 5, 29, 33, 37, 121, 129, 133, 241])
def test_chunks_joined_are_the_clip(mode, frames):
    with torch.device("meta"):
        encoder, decoder = HunyuanEncoder().bfloat16(), HunyuanDecoder().bfloat16()
    for half, length in ((encoder, frames), (decoder, 1 + (frames - 1) // 4)):
        clip = torch.arange(length).view(1, 1, length, 1, 1)
        for height, width in TABLE_2:
            channels, sides = (3, (height, width)) if half is encoder else (16, (height // 8, width // 8))
            plan = half.plan((1, channels, length, *sides), mode)
            assert torch.equal(torch.cat(list(chunks_of(plan, clip)), dim=2), clip)
