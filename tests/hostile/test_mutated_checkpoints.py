"""A training goes on from a damaged checkpoint as from the good one, or is refused in a line that names it."""

import random
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from many_cases import refusal, tally
from mutations import mutate_bytes

from train.checkpoint import INDEX, _read_manifest, _write_manifest, step_name
from train.loop import Loop
from train.marked_files import mark_of
from train.same_settings import check_settings
from train.schedule import Schedule
from train.stage import Loss, Stage

SHARD = "__0_0.distcp"


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
    """files: of the one checkpoint in a folder, by name."""

    files: dict[str, bytes]

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        path = folder / step_name(3)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in self.files.items():
            (path / name).write_bytes(content)
        # Checksums that are right again: no disk does this, but a program that writes such files may.
        checksums_right = draw.random() < 0.5
        name = draw.choice([INDEX, INDEX, SHARD] if checksums_right else sorted(self.files))
        (path / name).write_bytes(mutate_bytes(self.files[name], draw))
        if checksums_right:
            saved = _read_manifest(path)
            marks = {name: mark_of(path / name) for name in saved.files}
            _write_manifest(path, saved.done, saved.settings, marks)

        def resume() -> None:
            check_settings(folder, loop().settings, allow_others=False)
            loop().resume(folder)

        if refusal(resume, str(path)) is not None:
            return "refused in one line"
        if checksums_right:
            assert all(tensor.isfinite().all() for tensor in state()), "infinities or NaN were taken without a word"
            return "taken, with checksums of its own"
        taken = state()
        (path / name).write_bytes(self.files[name])
        resume()
        same = zip(taken, state(), strict=True)
        assert all(torch.equal(one, other) for one, other in same), "another state was taken without a word"
        return "taken as it was"


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_checkpoints(tmp_path: Path, count: int) -> None:
    trained = Loop(Line(), Schedule(8))
    for _ in range(3):
        trained.step()
    trained.save(tmp_path)
    check = DamagedCheckpoint({file.name: file.read_bytes() for file in (tmp_path / step_name(3)).iterdir()})
    counts = tally("checkpoints", check, range(count))
    assert counts["refused in one line"] > count // 2
    assert counts["taken, with checksums of its own"] > 0
