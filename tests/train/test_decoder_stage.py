"""The decoder's stage: what learns, from which frames, and that a resumed run goes on as an uninterrupted one."""

import pytest
import torch
from resumed_run import assert_a_resumed_run_equals_an_uninterrupted_one

from k5kernels.latents.video import to_model
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from train import decoder_stage
from train.decoder_stage import DecoderStage
from train.loop import Loop
from train.schedule import Schedule

TINY = VAEConfig(widths=(8, 8, 8, 8), groups=4, scaling_factor=1.0)
STEPS = 4
CLIP = torch.randint(0, 256, (12, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    monkeypatch.setattr(decoder_stage, "WINDOWS", ((1, 0.5), (9, 0.5)))


def make_loop() -> Loop:
    torch.manual_seed(0)
    encoder = HunyuanEncoder(TINY).requires_grad_(False)
    stage = DecoderStage(encoder, HunyuanDecoder(TINY), {"noise": CLIP})
    return Loop(stage, Schedule(STEPS, warmup_steps=1, decay_steps=STEPS, max_grad_norm=None))


def test_the_decoder_learns_and_the_encoder_stays():
    loop = make_loop()
    before = [parameter.clone() for parameter in loop.stage.encoder.parameters()]
    first = [parameter.detach().clone() for parameter in loop.stage.model.parameters()]
    for _ in range(STEPS):
        loop.step()
    for parameter, was in zip(loop.stage.encoder.parameters(), before, strict=True):
        assert torch.equal(parameter, was)
    for parameter, was in zip(loop.stage.model.parameters(), first, strict=True):
        assert not torch.equal(parameter, was)


def test_windows_are_whole_frames_in_a_row_of_every_length_and_half_of_them_mirrored(monkeypatch):
    stage, seen = make_loop().stage, []
    encode = HunyuanEncoder.encode
    monkeypatch.setattr(HunyuanEncoder, "encode", lambda *args: seen.append(args[1]) or encode(*args))
    for step in range(24):
        stage.loss(step, torch.Generator().manual_seed(step))
    mirrored = 0
    for video in seen:
        frames = video.shape[2]
        plain = [to_model(CLIP[start : start + frames]) for start in range(len(CLIP) - frames + 1)]
        mirrored += any(torch.equal(video, window.flip(-1)) for window in plain)
        assert any(torch.equal(video, window) or torch.equal(video, window.flip(-1)) for window in plain)
    assert {video.shape[2] for video in seen} == {1, 9}
    assert 4 < mirrored < 20


def test_a_clip_shorter_than_a_window_is_refused(monkeypatch):
    monkeypatch.setattr(decoder_stage, "WINDOWS", ((41, 1.0),))
    with pytest.raises(ValueError, match=r"noise: expected at least 41 frames, got 12"):
        make_loop()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    assert_a_resumed_run_equals_an_uninterrupted_one(make_loop, STEPS, 2, tmp_path)


def test_a_loss_names_the_clip_it_was_computed_from():
    assert make_loop().stage.loss(0, torch.Generator().manual_seed(0)).samples == ["noise"]
