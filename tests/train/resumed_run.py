"""What a training that goes on from a checkpoint must equal."""

from collections.abc import Callable
from pathlib import Path

import torch

from train.loop import Loop


def assert_a_resumed_run_equals_an_uninterrupted_one(
    make_loop: Callable[[], Loop], steps: int, saved_at: int, folder: Path
) -> None:
    """Losses, parameters and averages, bit for bit."""
    whole, first = make_loop(), make_loop()
    losses = [whole.step() for _ in range(steps)]
    resumed_losses = [first.step() for _ in range(saved_at)]
    first.save(folder / "checkpoints")
    second = make_loop()
    assert second.resume(folder / "checkpoints")
    resumed_losses += [second.step() for _ in range(steps - saved_at)]
    assert resumed_losses == losses
    for one, other in zip(second.stage.model.parameters(), whole.stage.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, average in whole.stage.average.tensors.items():
        assert torch.equal(second.stage.average.tensors[name], average)
