"""The encoder: equal to diffusers' untiled one, causal where the architecture is, clear about wrong shapes."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn
from vae_models import diffusers_vae, matching_encoder, relative_error, released_names

from k5kernels.vae import HunyuanEncoder, VAEConfig, latent_frames
from k5kernels.vae.layers import NormSiLU


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLHunyuanVideo:
    return diffusers_vae()


@pytest.fixture(scope="module")
def encoder(vae: AutoencoderKLHunyuanVideo) -> HunyuanEncoder:
    return matching_encoder(vae)


def random_video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 1, 64, 64), (1, 3, 5, 48, 72), (1, 3, 9, 40, 24), (2, 3, 5, 32, 48), (2, 3, 9, 24, 32), (1, 3, 1, 8, 8)],
)
@torch.inference_mode()
def test_equals_diffusers_untiled(
    vae: AutoencoderKLHunyuanVideo, encoder: HunyuanEncoder, shape: tuple[int, ...]
) -> None:
    video = random_video(*shape)
    expected = vae.encode(video).latent_dist
    mean, log_variance = encoder.moments(video)
    assert relative_error(mean, expected.mean) < 1e-5
    assert relative_error(log_variance, expected.logvar) < 1e-5
    assert relative_error(encoder(video), expected.mean * vae.config.scaling_factor) < 1e-5


@torch.inference_mode()
def test_differs_from_diffusers_by_float32_rounding_only() -> None:
    vae = diffusers_vae()
    encoder, video = matching_encoder(vae).double(), random_video(2, 3, 9, 24, 16).double()
    assert relative_error(encoder.moments(video)[0], vae.double().encode(video).latent_dist.mean) < 1e-10


def test_gradients_equal_diffusers(vae: AutoencoderKLHunyuanVideo, encoder: HunyuanEncoder) -> None:
    video = random_video(1, 3, 5, 24, 16)
    ours, theirs = video.clone().requires_grad_(), video.clone().requires_grad_()
    encoder.moments(ours)[0].square().sum().backward()
    vae.encode(theirs).latent_dist.mean.square().sum().backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-4


def test_state_dict_loads_into_diffusers() -> None:
    encoder, other = matching_encoder(diffusers_vae()).double(), diffusers_vae().double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    names = {
        name if name.startswith("quant_conv.") else f"encoder.{name}": t for name, t in encoder.state_dict().items()
    }
    missing, unexpected = other.load_state_dict(names, strict=False)
    assert not unexpected
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in missing)
    video = random_video(1, 3, 1, 16, 16).double()
    with torch.inference_mode():
        assert relative_error(encoder.moments(video)[0], other.encode(video).latent_dist.mean) < 1e-10


def test_released_widths_have_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKLHunyuanVideo().state_dict()
        ours = HunyuanEncoder().state_dict()
    expected = released_names(theirs, "encoder.", "quant_conv.")
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in expected.items()}


class PaddedSiLU(nn.SiLU):
    """NormSiLU without the norm."""

    def padded(self, x: Tensor, statistics: None, kernel: int) -> Tensor:
        side = kernel // 2
        return nn.functional.pad(self(x), (side, side, side, side, kernel - 1, 0), mode="replicate")


def fix_statistics(encoder: HunyuanEncoder) -> HunyuanEncoder:
    """Replace every GroupNorm, whose statistics span all frames, by what follows it: SiLU, or nothing."""
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.GroupNorm):
            encoder.set_submodule(name, PaddedSiLU() if isinstance(module, NormSiLU) else nn.Identity())
    return encoder


@torch.inference_mode()
def test_later_frames_never_reach_earlier_latents_but_through_group_statistics() -> None:
    encoder = fix_statistics(matching_encoder(diffusers_vae()))
    video = random_video(1, 3, 13, 16, 24)
    before = encoder(video)
    for frame in (1, 5, 9):
        changed = video.clone()
        changed[:, :, frame:] = random_video(1, 3, 13, 16, 24).flip(-1)[:, :, frame:]
        after = encoder(changed)
        first = latent_frames(frame)
        torch.testing.assert_close(after[:, :, :first], before[:, :, :first], rtol=1e-6, atol=1e-6)
        assert (after[:, :, first:] - before[:, :, first:]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3


@torch.inference_mode()
def test_batch_entries_do_not_mix(encoder: HunyuanEncoder) -> None:
    video = random_video(2, 3, 5, 16, 16)
    assert relative_error(encoder(video)[1:], encoder(video[1:])) < 1e-5


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 5, 16, 16), r"expected \[B, 3, frames, height, width\], got \[3, 5, 16, 16\]"),
        ((1, 4, 5, 16, 16), r"expected \[B, 3, frames, height, width\], got \[1, 4, 5, 16, 16\]"),
        ((1, 3, 4, 16, 16), r"video: expected 1 \+ a multiple of 4 frames, got 4"),
        ((1, 3, 0, 16, 16), r"video: expected 1 \+ a multiple of 4 frames, got 0"),
        ((1, 3, 5, 12, 16), r"multiples of 8, got \[12, 16\]"),
        ((1, 3, 5, 16, 0), r"multiples of 8, got \[16, 0\]"),
    ],
)
def test_wrong_shapes_say_what_was_expected(encoder: HunyuanEncoder, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"widths": (16, 32, 64)}, r"widths: expected four positive multiples of groups=32, got \(16, 32, 64\)"),
        ({"widths": (16, 32, 64, 12), "groups": 8}, r"widths: .* got \(16, 32, 64, 12\)"),
        ({"groups": 0}, "groups: expected at least 1, got 0"),
        ({"latent_channels": -1}, "latent_channels: expected at least 1, got -1"),
    ],
)
def test_wrong_configuration_is_refused(settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        VAEConfig(**settings)
