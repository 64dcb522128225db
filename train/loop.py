"""The loop that runs every stage of training: schedule, clipping, checkpoints, log, resuming, progress."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from train.checkpoint import load_checkpoint, save_checkpoint
from train.log import Log
from train.schedule import Schedule
from train.stage import Stage

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


class Loop:
    """A stage, its schedule and how many of the steps are done.

    Every step draws from a generator seeded by (seed, step), so a resumed run sees the batches and the noise that an
    uninterrupted one would.
    """

    def __init__(self, stage: Stage, schedule: Schedule) -> None:
        self.stage, self.schedule = stage, schedule
        self.done = 0
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def step(self) -> float:
        """One update of the parameters; the loss before it."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self) -> float:
        """Loss and gradients of the next step."""
        generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + self.done)
        loss = self.stage.loss(self.done, generator)
        for optimizer in self.stage.optimizers.values():
            optimizer.zero_grad()
        loss.value.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self._learning() if p.grad is not None])
        if self.schedule.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._learning(), self.schedule.max_grad_norm, norm)
        return float(loss.value.detach())

    def update(self) -> None:
        """Apply the gradients of `backward`."""
        factor = self.schedule.factor(self.done)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        for optimizer in self.stage.optimizers.values():
            optimizer.step()
        self.stage.average.update(self.done)
        self.done += 1

    def run(self, out: Path, every: int, measure: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Train to the end of the schedule, from the folder's checkpoint where there is one.

        Every `every` steps and at the end: a row in out/log.jsonl with the mean loss and time of the steps since the
        row before and what `measure` returns, and a checkpoint.
        """
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / LOG)
        self.resume(out / CHECKPOINT)
        losses: list[float] = []
        began = time.perf_counter()
        for _ in track(range(self.done, self.schedule.steps), description="training"):
            losses.append(self.step())
            if self.done % every == 0 or self.done == self.schedule.steps:
                milliseconds = (time.perf_counter() - began) * 1e3 / len(losses)
                row: dict[str, Any] = {
                    "step": self.done,
                    "loss": round(fmean(losses), 5),
                    "step_ms": round(milliseconds, 1),
                }
                log.append({**row, **measure()})
                self.save(out / CHECKPOINT)
                losses, began = [], time.perf_counter()

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs; the former file stays until the new one is whole."""
        save_checkpoint({"done": self.done, "stage": self.stage.state_dict()}, path)

    def resume(self, path: Path) -> bool:
        """Go on from a checkpoint; False where there is none."""
        state = load_checkpoint(path)
        if state is None:
            return False
        self.stage.load_state_dict(state["stage"])
        self.done = state["done"]
        return True

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.stage.optimizers.values() for group in optimizer.param_groups]

    def _learning(self) -> list[Tensor]:
        return [parameter for group in self._groups() for parameter in group["params"]]
