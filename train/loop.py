"""The loop that runs every stage of training: schedule, clipping, checkpoints, log, resuming, progress."""

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k5kernels.profiling import stage
from k5kernels.terminal import Stopped, complain
from train.checkpoint import KEEP, CheckpointError, Checkpoints, Saved
from train.communication import communication_share
from train.log import Interval, Log
from train.parallel import ALONE, Parallel, whole
from train.progress import ProgressLine
from train.ranks import everywhere
from train.same_settings import refuse_others
from train.schedule import Schedule
from train.stage import Loss, Stage
from train.stopping import StopRequest, noting_stops

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
NONFINITE_LIMIT = 3
Measure = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class NonFiniteError(ValueError):
    """A loss or a gradient that is infinite or NaN: no step was taken with it. samples: what it was computed from."""

    def __init__(self, message: str, samples: Sequence[str]) -> None:
        super().__init__(message)
        self.samples = samples


class Loop:
    """A stage, its schedule, how many steps are done, and how many of them a checkpoint holds.

    Every step draws from a generator seeded by (seed, step), so a resumed run sees the batches and the noise that an
    uninterrupted one would.

    parallel: the processes that train together, each with its own loop; the model must be sharded over them.
    """

    def __init__(self, stage: Stage, schedule: Schedule, parallel: Parallel = ALONE) -> None:
        self.stage, self.schedule, self.parallel = stage, schedule, parallel
        self.done = 0
        self.checkpoints: Checkpoints | None = None
        self._begun = self._resumed = 0  # steps behind the checkpoint that was begun last, and the one resumed from
        self._stop, self._stopping = StopRequest(), False
        for group in self._groups():
            group.setdefault("peak_lr", group["lr"])

    @property
    def settings(self) -> dict[str, Any]:
        """The schedule's and the stage's, as JSON has them; a checkpoint keeps them."""
        return json.loads(json.dumps({**self.schedule.settings, **self.stage.settings}))

    @property
    def saved(self) -> int:
        """Steps behind the newest checkpoint that is whole, 0 where there is none."""
        return max(self._resumed, self.checkpoints.saved if self.checkpoints is not None else 0)

    def step(self) -> float:
        """One update of the parameters; the loss before it."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self, ahead: int = 0) -> float:
        """Loss, its mean over all processes, and clipped gradients of the next step, or of the one `ahead` steps later.

        Raises, on every process, NonFiniteError where one of them is not finite, OSError where a save has failed.
        """
        step = self.done + ahead
        generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + step)
        with stage("loss"):
            loss = self.stage.loss(step, generator)
        for optimizer in self.stage.optimizers.values():
            optimizer.zero_grad()
        with stage("backward"):
            loss.value.backward()
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None]))
        told = [self._stop.number != 0, self.checkpoints is not None and self.checkpoints.failed]
        mine = torch.stack([loss.value.detach(), *(torch.tensor(float(one), device=norm.device) for one in told)])
        # The only point of a step that waits for the device.
        value, stopping, failed, size = torch.stack([*self.parallel.mean(mine), norm]).tolist()
        self._stopping = stopping > 0
        if failed and self.checkpoints is not None:
            self.checkpoints.wait()
        _check_finite(step, "loss", value, loss)
        _check_finite(step, "norm of the gradients", size, loss)
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
        measure: Measure = dict,
        *,
        set_on_resume: bool = False,
        keep: int = KEEP,
        nonfinite_limit: int = NONFINITE_LIMIT,
        trace_communication: bool = True,
        after_row: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the end of the schedule, from the folder's newest whole checkpoint where there is one.

        Every `every` steps and at the end, out/log.jsonl gets a row with the mean loss and time of the steps since the
        row before and what `measure`, called on every process with that, returns on the first. out/checkpoints gets a
        checkpoint, which is written while training goes on; the newest `keep` stay. It is begun only once the next
        step's loss and gradients are finite: parameters that a step has ruined never take the place of good ones. A
        step whose loss or gradients are not finite is left out, and the log names its samples; `nonfinite_limit` of
        them in a row end the training.

        SIGTERM and Ctrl-C end it between two steps, by Stopped, when the steps that are done are saved.

        set_on_resume: go on from a checkpoint of other settings with this run's. trace_communication: of many
        processes, trace the last step before each row, for the share of collectives; no other profiler may be recording
        then. after_row: called on every process, with the number of steps done, behind each row of the log. Raises
        CheckpointError where the checkpoint cannot be gone on from, NonFiniteError where training cannot go on, OSError
        where nothing can be written; the checkpoints then stay.
        """
        out.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(out / CHECKPOINTS, keep, self.parallel)
        self.checkpoints.remove_partial()
        self._resume(self.checkpoints, set_on_resume)
        with noting_stops() as self._stop:
            try:
                self._train(Log(out / LOG), every, measure, after_row, nonfinite_limit, trace_communication)
                self._prove(nonfinite_limit)
                self._begin_save()
            except NonFiniteError as error:
                self.checkpoints.wait()
                kept = f"the checkpoint of step {self.saved} stays" if self.saved else "there is no checkpoint yet"
                raise NonFiniteError(
                    f"{error}; {kept}: look at these samples, or lower the learning rate", error.samples
                ) from error
            finally:
                self.checkpoints.wait()

    def save(self, folder: Path) -> None:
        """Add a checkpoint with everything a resumed run needs to the folder."""
        self.checkpoints = Checkpoints(folder, parallel=self.parallel)
        self._begin_save()
        self.checkpoints.wait()

    def resume(self, folder: Path, set_on_resume: bool = False) -> bool:
        """Go on from the newest whole checkpoint in a folder; False where there is none.

        Says in a line which newer ones are damaged, and sets them aside. Raises CheckpointError as `run` does.
        """
        return self._resume(Checkpoints(folder, parallel=self.parallel), set_on_resume)

    def _train(
        self,
        log: Log,
        every: int,
        measure: Measure,
        after_row: Callable[[int], None] | None,
        nonfinite_limit: int,
        trace_communication: bool,
    ) -> None:
        """The steps that are left."""
        if self.parallel.first:
            log.keep_until(self.done)
        interval, in_a_row = Interval(), 0
        with ProgressLine(self.schedule.steps, self.done, self.parallel.first) as shown:
            while self.done < self.schedule.steps:
                row_follows = (self.done + 1) % every == 0 or self.done + 1 == self.schedule.steps
                with self._traced(interval, row_follows and trace_communication), interval.step():
                    try:
                        interval.losses.append(self.backward())
                        in_a_row = 0
                    except NonFiniteError as error:
                        interval.left_out.append(error.samples)
                        in_a_row += 1
                        if in_a_row == nonfinite_limit:
                            raise
                if in_a_row:
                    self.done += 1
                else:
                    with interval.checkpoint():
                        self._save_if_due(every)
                    with interval.step():
                        self.update()
                shown.step(self.done)
                if row_follows:
                    row = interval.row(self.done)
                    row |= measure(row)
                    if self.parallel.first:
                        log.append(row)
                        shown.row(row)
                    if after_row is not None:
                        after_row(self.done)
                    interval = Interval()

    @contextmanager
    def _traced(self, interval: Interval, trace: bool) -> Iterator[None]:
        """Where it is to be traced, what share of the step in the block is communication, a mean over the processes."""
        if self.parallel.world == 1:
            interval.communication = 0.0
        if self.parallel.world == 1 or not trace:
            yield
            return
        with communication_share(self.stage.device) as share:
            yield
        interval.communication = self.parallel.mean(torch.tensor(share.value)).item()

    def _save_if_due(self, every: int) -> None:
        """The parameters are good: they have just given a finite loss and finite gradients."""
        if self._stopping or self.done // every * every > self._begun:
            self._begin_save()
        if self._stopping:
            raise Stopped(self._stop.number or signal.SIGTERM)

    def _prove(self, nonfinite_limit: int) -> None:
        """Show that the last parameters are good; a batch that is not is passed over, as in training."""
        if self.done == self._begun:
            return
        for ahead in range(nonfinite_limit):
            try:
                self.backward(ahead)
                return
            except NonFiniteError:
                if ahead == nonfinite_limit - 1:
                    raise

    def _begin_save(self) -> None:
        assert self.checkpoints is not None
        if self.done > self._begun:
            with stage("checkpoint"):
                self.checkpoints.save(self.done, self.settings, self.stage.state_dict())
            self._begun = self.done

    def _resume(self, checkpoints: Checkpoints, set_on_resume: bool) -> bool:
        saved, refused = checkpoints.newest()
        if saved is None:
            return False
        refuse_others(saved.path, saved.settings, self.settings, set_on_resume)
        if saved.done > self.schedule.steps:
            raise CheckpointError(f"{saved.path}: {saved.done} steps are done, expected at most {self.schedule.steps}")
        self._load(saved, checkpoints)
        if refused:
            checkpoints.set_aside_after(saved.done)
        if self.parallel.first:
            for error in refused:
                complain(f"{error}; set aside, training goes on from step {saved.done}", "train")
        self.done = self._begun = self._resumed = saved.done
        return True

    def _load(self, saved: Saved, checkpoints: Checkpoints) -> None:
        try:
            tensors = self.stage.room(saved.tensors())
            saved.read_into(tensors, checkpoints.group)
            everywhere(lambda: self.stage.take(tensors), checkpoints.group)
        except CheckpointError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{saved.path}: its state does not fit this stage ({reason})") from error

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.stage.optimizers.values() for group in optimizer.param_groups]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._groups() for parameter in group["params"]]


def _check_finite(step: int, what: str, value: float, loss: Loss) -> None:
    if not math.isfinite(value):
        words = f"step {step + 1}: expected a finite {what}, got {value}, on {', '.join(loss.samples)}"
        raise NonFiniteError(words, loss.samples)
