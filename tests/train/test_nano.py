"""The nano models that ship are what settings.json says they are."""

import json

import pytest
import torch

from k5kernels.vae.weights import load_decoder, load_encoder
from model.nano import CROSSDIT_WEIGHTS, SETTINGS, VAE_WEIGHTS, load_settings
from model.presets import PRESETS
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


def test_the_vae_reaches_its_figures_on_held_out_frames():
    measured = held_out_psnr(load_encoder(VAE_WEIGHTS), load_decoder(VAE_WEIGHTS), held_out_clips())
    for name in NAMES:
        assert measured[name] == pytest.approx(FIGURES["vae"]["held_out_psnr_db"][name], abs=0.1)


def test_the_latents_have_a_standard_deviation_of_about_one():
    encoder, clips = load_encoder(VAE_WEIGHTS), held_out_clips()
    with torch.inference_mode():
        latent = encoder(clips[NAMES[0]])
    assert 0.5 < float(latent.std()) < 2.0


def test_nabla_is_not_degenerate():
    rows = {row["thr"]: row for row in FIGURES["nabla_without_sta"]}
    densities = [rows[thr]["density"] for thr in (0.9, 0.7, 0.4)]
    assert densities == sorted(densities, reverse=True)
    assert 0.02 < densities[-1] < densities[0] < 0.95


def test_magcache_is_calibrated_for_both_branches_of_50_steps():
    ratios = load_settings().mag_ratios
    assert {name: len(values) for name, values in ratios.items()} == {"cond": 49, "uncond": 49}
