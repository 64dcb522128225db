"""A training learns, resumes bit for bit, and never loses its last good checkpoint."""

import pytest
import torch
from latent_samples import sample

from k5kernels.attention import AttentionConfig
from k5kernels.presets import CrossDiTConfig
from model.conditioning import TextCondition
from model.crossdit import CrossDiT
from train import checkpoint
from train.latents import LatentSet
from train.trainer import TrainConfig, Trainer

TINY = CrossDiTConfig(
    model_dim=32,
    time_dim=16,
    ff_dim=64,
    text_blocks=1,
    visual_blocks=2,
    axes_dims=(4, 6, 6),
    in_text_dim=8,
    in_text_dim2=8,
)


def encode_text(captions: list[str]) -> TextCondition:
    tokens = torch.stack([torch.full((2, 8), float(len(caption))) for caption in captions])
    return TextCondition(tokens, None, tokens.mean(1))


def make_trainer(**settings) -> Trainer:
    torch.manual_seed(0)
    data = LatentSet([sample("a.mp4", (2, 4, 4), i) for i in range(3)], {"a": "words"})
    return Trainer(CrossDiT(TINY), data, encode_text, TrainConfig(**{"steps": 8, "warmup_steps": 2} | settings))


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("attention", [AttentionConfig(), AttentionConfig("nabla", 0.9, (1, 3, 3))])
def test_the_loss_falls(attention):
    trainer = make_trainer(steps=120, peak_learning_rate=3e-3, batch=2, attention=attention)
    losses = [trainer.step() for _ in range(120)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first = make_trainer(), make_trainer()
    losses = [whole.step() for _ in range(6)]
    resumed_losses = [first.step() for _ in range(3)]
    first.save(tmp_path / "checkpoint.pt")
    second = make_trainer()
    assert second.resume(tmp_path / "checkpoint.pt")
    resumed_losses += [second.step() for _ in range(3)]
    assert resumed_losses == losses
    assert torch.equal(parameters(second), parameters(whole))
    assert all(torch.equal(second.ema[name], whole.ema[name]) for name in whole.ema)


def test_nothing_is_resumed_where_nothing_was_saved(tmp_path):
    assert not make_trainer().resume(tmp_path / "checkpoint.pt")


def test_a_save_that_fails_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    trainer, path = make_trainer(), tmp_path / "checkpoint.pt"
    trainer.save(path)
    before = path.read_bytes()

    def full_disk(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_average_follows_the_weights():
    trainer = make_trainer(ema_decay=0.0)
    trainer.step()
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(trainer.ema[name], weights[name]) for name in weights)


def test_every_caption_is_dropped_when_all_training_is_unconditional():
    seen: list[str] = []
    trainer = make_trainer(unconditional=1.0, batch=3)
    trainer.encode_text = lambda captions: seen.extend(captions) or encode_text(captions)
    trainer.step()
    assert seen == ["", "", ""]


def test_single_frames_train_without_a_given_frame():
    assert make_trainer(latent_frames=1, image_to_video=1.0).step() > 0


@pytest.mark.parametrize(("field", "value"), [("unconditional", 1.5), ("image_to_video", -0.1), ("steps", 0)])
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{"steps": 1} | {field: value})
