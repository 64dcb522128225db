"""The nano models that ship are what settings.json says they are."""

import json
from functools import cache

import pytest
import torch
from torch import Tensor

from k5kernels.attention import AttentionConfig, record_block_masks
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae import HunyuanEncoder
from k5kernels.vae.weights import load_decoder, load_encoder
from model.flow_matching import condition_input, noisy_latent
from model.latent_tokens import latent_velocity
from model.nano import CROSSDIT_WEIGHTS, SETTINGS, VAE_WEIGHTS, load_settings
from model.presets import PRESETS
from model.weights import load_crossdit
from train.clips import NAMES
from train.nano_vae import held_out_clips, held_out_psnr

FIGURES = json.loads(SETTINGS.read_text())
QUICK, *OTHERS = sorted(NAMES, reverse=True)  # carphone_pristine has the fewest pixels


@pytest.fixture(scope="module")
def clips() -> dict[str, Tensor]:
    return held_out_clips()


@pytest.fixture(scope="module")
def encoder() -> HunyuanEncoder:
    """It encodes each clip once, as that takes seconds, and several tests look at the same one."""
    loaded = load_encoder(VAE_WEIGHTS)
    loaded.forward = cache(loaded.forward)
    return loaded


def test_both_fit_in_16_mb():
    assert VAE_WEIGHTS.stat().st_size + CROSSDIT_WEIGHTS.stat().st_size <= 16e6


def test_the_crossdit_is_the_preset():
    model = load_crossdit(CROSSDIT_WEIGHTS)
    assert model.config == PRESETS["nano"]
    assert model.config.visual_blocks >= 8
    assert model.config.head_dim == 64
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_vae_reaches_its_figures_on_held_out_frames(name, clips, encoder):
    measured = held_out_psnr(encoder, load_decoder(VAE_WEIGHTS), {name: clips[name]})
    assert measured[name] == pytest.approx(FIGURES["vae"]["held_out_psnr_db"][name], abs=0.1)


def test_the_latents_have_a_standard_deviation_of_about_one(clips, encoder):
    with torch.inference_mode():
        latent = encoder(clips[QUICK])
    assert 0.5 < float(latent.std()) < 2.0


@torch.inference_mode()
def test_nabla_finds_sparse_masks_that_follow_the_threshold(clips, encoder):
    latent = encoder(clips[QUICK]).permute(0, 2, 3, 4, 1)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    channels = condition_input(noisy_latent(latent, noise, torch.tensor([0.5])), latent[:, :1])
    model, text = load_crossdit(CROSSDIT_WEIGHTS), MiniLMTextEncoder().encode(["A man in a car."])
    densities = []
    for thr in (0.9, 0.7, 0.4):
        seen: list[float] = []
        with record_block_masks(lambda mask, seen=seen: seen.append(mask.density)):
            latent_velocity(model, channels, torch.tensor([500.0]), text, attention=AttentionConfig("nabla", thr))
        densities.append(sum(seen) / len(seen))
    assert 0.02 < densities[2] < densities[1] < densities[0] < 0.95, densities


def test_magcache_is_calibrated_for_both_branches_of_50_steps():
    ratios = load_settings().mag_ratios
    assert {name: len(values) for name, values in ratios.items()} == {"cond": 49, "uncond": 49}
