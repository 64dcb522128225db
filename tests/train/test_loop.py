"""The loop resumes bit for bit, runs any stage, and never loses its last good checkpoint."""

import pytest
import torch
from tiny_stage import parameters, tiny_loop
from torch import nn

from train import checkpoint
from train.loop import Loop
from train.schedule import Schedule
from train.stage import Loss, Stage


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first = tiny_loop(), tiny_loop()
    losses = [whole.step() for _ in range(6)]
    resumed_losses = [first.step() for _ in range(3)]
    first.save(tmp_path / "checkpoint.pt")
    second = tiny_loop()
    assert second.resume(tmp_path / "checkpoint.pt")
    resumed_losses += [second.step() for _ in range(3)]
    assert resumed_losses == losses
    assert torch.equal(parameters(second), parameters(whole))
    averages = second.stage.average.tensors
    assert all(torch.equal(averages[name], average) for name, average in whole.stage.average.tensors.items())


def test_nothing_is_resumed_where_nothing_was_saved(tmp_path):
    assert not tiny_loop().resume(tmp_path / "checkpoint.pt")


def test_a_save_that_fails_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    loop, path = tiny_loop(), tmp_path / "checkpoint.pt"
    loop.save(path)
    before = path.read_bytes()

    def full_disk(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        loop.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_average_follows_the_weights():
    loop = tiny_loop(ema_decay=0.0)
    loop.step()
    averages = loop.stage.average.tensors
    assert all(torch.equal(averages[name], weight) for name, weight in loop.stage.model.named_parameters())


class Duel(Stage):
    """Two networks that learn in turn, each by its own optimizer, as adversarial post-training needs."""

    def __init__(self) -> None:
        model = nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 1)})
        optimizers = {name: torch.optim.AdamW(part.parameters(), lr=1e-2) for name, part in model.items()}
        super().__init__({"stage": "duel"}, model, optimizers, ema_decay=0.9)

    def loss(self, step, generator):
        generated = self.model["generator"](torch.randn(4, 2, generator=generator))
        if step % 2:
            for parameter in self.model["critic"].parameters():
                parameter.requires_grad_(False)
            return Loss(-self.model["critic"](generated).mean(), ["noise"])
        for parameter in self.model["critic"].parameters():
            parameter.requires_grad_(True)
        return Loss(self.model["critic"](generated.detach()).mean(), ["noise"])


def test_two_networks_can_learn_in_turn_without_another_loop():
    loop = Loop(Duel(), Schedule(4, warmup_steps=0))
    moved = []
    for _ in range(4):
        before = {name: part.weight.detach().clone() for name, part in loop.stage.model.items()}
        loop.step()
        moved.append([name for name, part in loop.stage.model.items() if not torch.equal(part.weight, before[name])])
    assert moved == [["critic"], ["generator"]] * 2
