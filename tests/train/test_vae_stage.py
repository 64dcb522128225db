"""The VAE's stage: what learns in each phase, and that a resumed run goes on as an uninterrupted one."""

import pytest
import torch
from resumed_run import assert_a_resumed_run_equals_an_uninterrupted_one

from k5kernels.vae import VAEConfig
from train import vae_stage
from train.loop import Loop
from train.schedule import Schedule
from train.vae_stage import VAE, VAEStage

TINY = VAEConfig(widths=(8, 8, 8, 8), groups=4, scaling_factor=1.0)
STEPS = 4  # two on single frames, one on short videos, one on large crops


@pytest.fixture(autouse=True)
def _small_crops(monkeypatch):
    monkeypatch.setattr(vae_stage, "IMAGE_CROPS", ((2, 1, 16, 1.0),))
    monkeypatch.setattr(vae_stage, "VIDEO_CROPS", ((1, 5, 16, 1.0),))
    monkeypatch.setattr(vae_stage, "LARGE_CROPS", ((1, 9, 16, 1.0),))


def make_loop() -> Loop:
    torch.manual_seed(0)
    clips = {"noise": torch.randint(0, 256, (12, 24, 24, 3), dtype=torch.uint8)}
    return Loop(VAEStage(VAE(TINY), clips, STEPS), Schedule(STEPS, warmup_steps=1, max_grad_norm=None))


def past_filters(loop: Loop) -> torch.Tensor:
    return torch.cat([conv.weight[:, :, :-1].detach().flatten() for conv in loop.stage.model.convolutions()])


def test_filters_of_past_frames_learn_only_after_the_single_frames():
    loop, learned = make_loop(), []
    for _ in range(STEPS):
        loop.step()
        learned.append(bool(past_filters(loop).any()))
    assert learned == [False, False, True, True]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    assert_a_resumed_run_equals_an_uninterrupted_one(make_loop, STEPS, 3, tmp_path)


def test_a_loss_names_the_clips_it_was_computed_from():
    assert make_loop().stage.loss(0, torch.Generator().manual_seed(0)).samples == ["noise", "noise"]
