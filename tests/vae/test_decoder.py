"""The decoder: equal to diffusers' untiled one, clear about wrong shapes."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from vae_models import diffusers_vae, matching_decoder, relative_error, released_names

from k5kernels.vae import HunyuanDecoder


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLHunyuanVideo:
    return diffusers_vae()


@pytest.fixture(scope="module")
def decoder(vae: AutoencoderKLHunyuanVideo) -> HunyuanDecoder:
    return matching_decoder(vae)


def random_latent(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 1, 8, 8), (1, 16, 2, 6, 9), (1, 16, 3, 5, 3), (2, 16, 2, 6, 8), (2, 16, 1, 8, 10), (1, 16, 1, 1, 1)],
)
@torch.inference_mode()
def test_equals_diffusers_untiled(
    vae: AutoencoderKLHunyuanVideo, decoder: HunyuanDecoder, shape: tuple[int, ...]
) -> None:
    latent = random_latent(*shape)
    expected = vae.decode(latent / vae.config.scaling_factor).sample
    assert relative_error(decoder(latent), expected) < 1e-5


@torch.inference_mode()
def test_differs_from_diffusers_by_float32_rounding_only() -> None:
    vae = diffusers_vae()
    decoder, latent = matching_decoder(vae).double(), random_latent(2, 16, 3, 3, 4).double()
    assert relative_error(decoder(latent), vae.double().decode(latent / vae.config.scaling_factor).sample) < 1e-10


@torch.inference_mode()
def test_first_frame_stands_alone_and_every_other_latent_frame_becomes_four(decoder: HunyuanDecoder) -> None:
    assert decoder(random_latent(1, 16, 3, 2, 4)).shape == (1, 3, 9, 16, 32)


def test_state_dict_loads_into_diffusers() -> None:
    decoder, other = matching_decoder(diffusers_vae()).double(), diffusers_vae().double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    conv = "post_quant_conv."
    names = {name if name.startswith(conv) else f"decoder.{name}": t for name, t in decoder.state_dict().items()}
    missing, unexpected = other.load_state_dict(names, strict=False)
    assert not unexpected
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in missing)
    latent = random_latent(1, 16, 1, 2, 2).double()
    with torch.inference_mode():
        assert relative_error(decoder(latent * decoder.config.scaling_factor), other.decode(latent).sample) < 1e-10


def test_released_widths_have_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKLHunyuanVideo().state_dict()
        ours = HunyuanDecoder().state_dict()
    expected = released_names(theirs, "decoder.", "post_quant_conv.")
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in expected.items()}


@pytest.mark.parametrize("shape", [(16, 1, 2, 2), (1, 3, 1, 2, 2)])
def test_wrong_shapes_say_what_was_expected(decoder: HunyuanDecoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 16, T, h, w\], got"):
        decoder(torch.zeros(shape))
