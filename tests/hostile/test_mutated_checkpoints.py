"""A training goes on from a damaged checkpoint as from the good one, or is refused in a line that names it."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from many_cases import refusal, tally
from mutations import mutate_bytes, mutate_zip_member

from train.checkpoint import check_settings
from train.loop import Loop
from train.schedule import Schedule
from train.stage import Loss, Stage


class Line(Stage):
    """A stage of few tensors, whose checkpoints are read in no time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizers = {"adamw": torch.optim.AdamW(model.parameters())}
        super().__init__({"stage": "line", "model": {"width": 2}}, model, optimizers, ema_decay=0.9)

    def loss(self, step: int, generator: torch.Generator) -> Loss:
        return Loss(self.model(torch.randn(4, 2, generator=generator)).square().mean(), ["noise"])


@cache
def loop() -> Loop:
    """One for all cases of a process: each overwrites what the one before left."""
    return Loop(Line(), Schedule(8))


def state() -> list[torch.Tensor]:
    """Every tensor of the stage, as it is now."""
    stage = loop().stage
    moments = (
        value for optimizer in stage.optimizers.values() for kept in optimizer.state.values() for value in kept.values()
    )
    return [
        tensor.detach().clone() for tensor in (*stage.model.parameters(), *stage.average.tensors.values(), *moments)
    ]


@dataclass(frozen=True)
class DamagedCheckpoint:
    checkpoint: bytes

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        # Checksums that are right again: no disk does this, but a program that writes such files may.
        in_members = draw.random() < 0.5
        path = folder / "checkpoint.pt"
        path.write_bytes((mutate_zip_member if in_members else mutate_bytes)(self.checkpoint, draw))

        def resume() -> None:
            check_settings(path, loop().settings, allow_others=False)
            loop().resume(path)

        if refusal(resume, str(path)) is not None:
            return "refused in one line"
        if in_members:
            assert all(tensor.isfinite().all() for tensor in state()), "infinities or NaN were taken without a word"
            return "taken, with checksums of its own"
        taken = state()
        path.write_bytes(self.checkpoint)
        resume()
        same = zip(taken, state(), strict=True)
        assert all(torch.equal(one, other) for one, other in same), "another state was taken without a word"
        return "taken as it was"


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_checkpoints(tmp_path: Path, count: int) -> None:
    trained = Loop(Line(), Schedule(8))
    for _ in range(3):
        trained.step()
    trained.save(tmp_path / "good.pt")
    check = DamagedCheckpoint((tmp_path / "good.pt").read_bytes())
    counts = tally("checkpoints", check, range(count))
    assert counts["refused in one line"] > count // 2
    assert counts["taken as it was"] > 0
