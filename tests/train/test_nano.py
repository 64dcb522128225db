"""The nano models that ship are what settings.json says they are."""

import json

import pytest
import torch

from k5kernels.attention import AttentionConfig, record_block_masks
from k5kernels.vae.weights import load_decoder, load_encoder
from model.flow_matching import condition_input, noisy_latent
from model.latent_tokens import latent_velocity
from model.nano import CROSSDIT_WEIGHTS, SETTINGS, VAE_WEIGHTS, load_settings
from model.presets import PRESETS
from model.text_encoders import MiniLMTextEncoder
from model.weights import load_crossdit
from train.clips import NAMES
from train.nano_vae import held_out_clips, held_out_psnr

FIGURES = json.loads(SETTINGS.read_text())


def test_both_fit_in_16_mb():
    assert VAE_WEIGHTS.stat().st_size + CROSSDIT_WEIGHTS.stat().st_size <= 16e6


def test_the_crossdit_is_the_preset():
    model = load_crossdit(CROSSDIT_WEIGHTS)
    assert model.config == PRESETS["nano"]
    assert model.config.visual_blocks >= 8
    assert model.config.head_dim == 64
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_vae_reaches_its_figures_on_held_out_frames(name):
    clip = {name: held_out_clips()[name]}
    measured = held_out_psnr(load_encoder(VAE_WEIGHTS), load_decoder(VAE_WEIGHTS), clip)
    assert measured[name] == pytest.approx(FIGURES["vae"]["held_out_psnr_db"][name], abs=0.1)


def test_the_latents_have_a_standard_deviation_of_about_one():
    encoder, clips = load_encoder(VAE_WEIGHTS), held_out_clips()
    with torch.inference_mode():
        latent = encoder(clips[NAMES[0]])
    assert 0.5 < float(latent.std()) < 2.0


@torch.inference_mode()
def test_nabla_finds_sparse_masks_that_follow_the_threshold():
    clip = held_out_clips()[NAMES[0]]
    latent = load_encoder(VAE_WEIGHTS)(clip).permute(0, 2, 3, 4, 1)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    channels = condition_input(noisy_latent(latent, noise, torch.tensor([0.5])), latent[:, :1])
    model, text = load_crossdit(CROSSDIT_WEIGHTS), MiniLMTextEncoder().encode(["A rabbit."])
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
