"""The image VAE behind the video encoder's interface: diffusers' values, any size."""

import pytest
import torch
from diffusers import AutoencoderKL
from vae_models import diffusers_vae

from k5kernels.vae import FluxVAE


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = (8, 8, 8, 8)
    return AutoencoderKL(
        **blocks, block_out_channels=widths, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_images_are_encoded_and_decoded_as_diffusers_does(vae):
    ours, x = FluxVAE.from_diffusers(vae), images(2, 3, 1, 24, 16)
    posterior, expected = ours.encode(x), vae.encode(x[:, :, 0]).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean[:, :, None], rtol=0, atol=0)
    torch.testing.assert_close(posterior.logvar, expected.logvar[:, :, None], rtol=0, atol=0)
    decoded = vae.decode(expected.mean).sample[:, :, None]
    torch.testing.assert_close(ours.decode(posterior.mode()), decoded, rtol=0, atol=0)


def test_any_size_comes_back(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    ours = FluxVAE.from_pretrained(tmp_path)
    latent = ours.encode(images(1, 3, 1, 19, 9)).mode()
    assert latent.shape == (1, 16, 1, 3, 2)
    assert ours.decode(latent, size=(19, 9)).shape == (1, 3, 1, 19, 9)


def test_what_does_not_fit_is_refused(vae):
    ours = FluxVAE.from_diffusers(vae)
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 1, height, width\], got \[1, 3, 5, 8, 8\]"):
        ours.encode(images(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match=r"latent: expected \[B, 16, 1, h, w\], got \[1, 4, 1, 1, 1\]"):
        ours.decode(torch.zeros(1, 4, 1, 1, 1))
    with pytest.raises(ValueError, match="size: expected one of a latent of"):
        ours.decode(torch.zeros(1, 16, 1, 1, 1), size=(9, 8))
    with pytest.raises(ValueError, match="expected diffusers' AutoencoderKL with 4 resolutions"):
        FluxVAE.from_diffusers(diffusers_vae())
