"""The loop that runs every stage of training: schedule, clipping, checkpoints, log, resuming, progress."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from k5kernels.profiling import stage
from train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, refuse_others, save_checkpoint
from train.log import Log
from train.parallel import ALONE, Parallel, whole
from train.schedule import Schedule
from train.stage import Loss, Stage

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


class NonFiniteError(ValueError):
    """A loss or a gradient that is infinite or NaN: no step was taken with it."""


class Loop:
    """A stage, its schedule, how many steps are done, and how many of them a checkpoint holds.

    Every step draws from a generator seeded by (seed, step), so a resumed run sees the batches and the noise that an
    uninterrupted one would.

    parallel: the processes that train together, each with its own loop; the model must be sharded over them.
    """

    def __init__(self, stage: Stage, schedule: Schedule, parallel: Parallel = ALONE) -> None:
        self.stage, self.schedule, self.parallel = stage, schedule, parallel
        self.done = self.saved = 0
        for group in self._groups():
            group.setdefault("peak_lr", group["lr"])

    @property
    def settings(self) -> dict[str, Any]:
        """The schedule's and the stage's, as JSON has them; a checkpoint keeps them."""
        return json.loads(json.dumps({**self.schedule.settings, **self.stage.settings}))

    def step(self) -> float:
        """One update of the parameters; the loss before it."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self) -> float:
        """Loss, its mean over all processes, and clipped gradients of the next step.

        Raises NonFiniteError, on every process, where one of them is not finite.
        """
        generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + self.done)
        with stage("loss"):
            loss = self.stage.loss(self.done, generator)
        for optimizer in self.stage.optimizers.values():
            optimizer.zero_grad()
        with stage("backward"):
            loss.value.backward()
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None]))
        mean = self.parallel.mean(loss.value.detach())
        value, size = torch.stack([mean, norm]).tolist()  # the only point of a step that waits for the device
        self._check_finite("loss", value, loss)
        self._check_finite("norm of the gradients", size, loss)
        if self.schedule.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters(), self.schedule.max_grad_norm, norm)
        return value

    def update(self) -> None:
        """Apply the gradients of `backward`."""
        factor = self.schedule.factor(self.done)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        with stage("optimizer"):
            for optimizer in self.stage.optimizers.values():
                optimizer.step()
            self.stage.average.update(self.done)
        self.done += 1

    def run(
        self,
        out: Path,
        every: int,
        measure: Callable[[], Mapping[str, Any]] = dict,
        *,
        set_on_resume: bool = False,
    ) -> None:
        """Train to the end of the schedule, from the folder's checkpoint where there is one.

        Every `every` steps and at the end, out/log.jsonl gets a row with the mean loss and time of the steps since the
        row before and what `measure`, called on every process, returns on the first. out/checkpoint.pt is replaced,
        but only once the next step's loss and gradients are finite: parameters that a step has ruined never take the
        place of good ones.

        set_on_resume: go on from a checkpoint of other settings with this run's. Raises CheckpointError where the
        checkpoint cannot be gone on from, NonFiniteError where training cannot go on; the checkpoint then stays.
        """
        out.mkdir(parents=True, exist_ok=True)
        log, checkpoint = Log(out / LOG), out / CHECKPOINT
        self.resume(checkpoint, set_on_resume)
        if self.parallel.first:
            log.keep_until(self.done)
        losses: list[float] = []
        seconds = 0.0
        steps = range(self.done, self.schedule.steps)
        for _ in track(steps, description="training", disable=not self.parallel.first):
            began = time.perf_counter()
            losses.append(self.backward())
            seconds += time.perf_counter() - began
            if self.done % every == 0 and self.done > self.saved:
                self.save(checkpoint)
            began = time.perf_counter()
            self.update()
            seconds += time.perf_counter() - began
            if self.done % every == 0 or self.done == self.schedule.steps:
                row: dict[str, Any] = {"step": self.done, "loss": round(fmean(losses), 5)}
                row["step_ms"] = round(seconds * 1e3 / len(losses), 1)
                measured = measure()
                if self.parallel.first:
                    log.append({**row, **measured})
                losses, seconds = [], 0.0
        if self.done > self.saved:
            self.backward()
            self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs; the former file stays until the new one is whole."""
        save_checkpoint(Checkpoint(self.done, self.settings, self.stage.state_dict()), path)
        self.saved = self.done

    def resume(self, path: Path, set_on_resume: bool = False) -> bool:
        """Go on from a checkpoint; False where there is none. Raises CheckpointError as `run` does."""
        checkpoint = load_checkpoint(path)
        if checkpoint is None:
            return False
        refuse_others(path, checkpoint.settings, self.settings, set_on_resume)
        if checkpoint.done > self.schedule.steps:
            raise CheckpointError(f"{path}: {checkpoint.done} steps are done, expected at most {self.schedule.steps}")
        try:
            self.stage.load_state_dict(checkpoint.stage)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: its state does not fit this stage ({reason})") from error
        self.done = self.saved = checkpoint.done
        return True

    def _check_finite(self, what: str, value: float, loss: Loss) -> None:
        if not math.isfinite(value):
            kept = f"the checkpoint of step {self.saved} stays" if self.saved else "there is no checkpoint yet"
            raise NonFiniteError(
                f"step {self.done + 1}: expected a finite {what}, got {value}, on {', '.join(loss.samples)}; {kept}: "
                "look at these samples, or lower the learning rate"
            )

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.stage.optimizers.values() for group in optimizer.param_groups]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._groups() for parameter in group["params"]]
