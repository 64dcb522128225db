"""Sizes of the released models and the settings they were released with."""

import math

import pytest
import torch

from k5kernels import planner
from k5kernels.presets import RELEASED
from model import DENSE, AttentionConfig, CrossDiT
from model.presets import PRESETS


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta_model(name: str) -> CrossDiT:
    with torch.device("meta"):
        return CrossDiT(PRESETS[name])


@pytest.mark.parametrize(("name", "billions"), [("image_lite", 6), ("video_lite", 2), ("video_pro", 19)])
def test_parameter_counts_are_those_of_the_report(name, billions):
    assert round(parameters(meta_model(name)) / 1e9) == billions


@pytest.mark.parametrize("name", PRESETS)
def test_the_planner_counts_the_visual_blocks(name):
    """P is L·(9·d_t·d + 8·d² + 2·d_f·d): matrices of the visual blocks, without their biases and RMSNorm weights.

    It leaves out the LTF blocks, the embeddings of text, time and patches, and the output layer: 3.2% of Image
    Lite, 4.9% of Video Lite and of Video Pro.
    """
    config, model = PRESETS[name], meta_model(name)
    d = config.model_dim
    P = config.visual_blocks * (9 * config.time_dim * d + 8 * d**2 + 2 * config.ff_dim * d)
    assert planner.parameters(d, config.time_dim, config.ff_dim, config.visual_blocks) == P
    assert parameters(model.visual_transformer_blocks) == pytest.approx(P, rel=0.03)
    if name != "nano":
        assert 0.03 < 1 - P / parameters(model) < 0.05


def test_nano_fits_in_ten_megabytes_of_bfloat16():
    assert parameters(meta_model("nano")) * 2 < 10e6


def test_every_release_has_a_model_and_settings_that_hold_together():
    assert len(RELEASED) == 17
    for name, settings in RELEASED.items():
        family = {"lite": "video_lite", "pro": "video_pro"}[name.split("_")[0]]
        sizes = PRESETS["image_lite" if "2i_" in name else family]
        assert (settings.config.model_dim, settings.config.visual_blocks) == (sizes.model_dim, sizes.visual_blocks)
        assert settings.config.visual_cond == ("t2i" not in name)
        assert settings.guidance >= 1
        assert len(settings.rope_scale) == 3
        if settings.mag_ratios is not None:
            assert len(settings.mag_ratios) == 2 * (settings.num_steps - 1)
            assert all(math.isfinite(ratio) for ratio in settings.mag_ratios)
        assert hash(settings)


def test_settings_are_those_of_the_release():
    pro = RELEASED["pro_t2v_10s_sft_hd"]
    assert pro.attention == AttentionConfig("nabla", 0.7, (11, 3, 3))
    assert (pro.guidance, pro.num_steps, pro.rope_scale) == (5.0, 50, (1.0, 3.16, 3.16))
    assert RELEASED["lite_t2v_10s_sft_sd"].attention.thr == 0.9
    assert RELEASED["pro_t2v_5s_sft_hd"].attention.thr == 0.8
    distilled = RELEASED["lite_t2v_5s_distil_sd"]
    assert (distilled.attention, distilled.guidance, distilled.num_steps) == (DENSE, 1.0, 16)
    assert distilled.scheduler_scale == 5
