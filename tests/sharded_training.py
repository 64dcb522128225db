"""A small training whose weights are sharded over gloo processes, which a test can kill; they fork in a moment."""

import faulthandler
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import typer
from torch import nn
from torch.distributed.fsdp import fully_shard

from bench.gloo_processes import context
from k5kernels.terminal import one_line_errors, one_line_stop
from train.loop import CHECKPOINTS, Loop
from train.optimizer import adamw
from train.parallel import ALONE, Parallel, processes
from train.schedule import Schedule
from train.stage import Loss, Stage

WIDTH, BATCH = 192, 4
EVERY = 2
CPU = torch.device("cpu")
# A process whose peer was killed ends by itself within this time, once both train. Before, they wait for each other in
# a store that knows nothing of processes, and only torchrun, which kills what does not end, helps.
PATIENCE_SECONDS = 20.0


class Wide(Stage):
    """Two matrices that learn the identity; odd sides, so that shards are of several lengths."""

    def __init__(self, parallel: Parallel = ALONE) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH + 1, WIDTH - 1), nn.GELU(), nn.Linear(WIDTH - 1, WIDTH + 1))
        model.register_buffer("constant", torch.tensor(2.0))  # not sharded: all ranks have it
        if parallel.weights is not None:
            fully_shard(model, mesh=parallel.weights)
        self.own = parallel.own(BATCH)
        super().__init__({"stage": "wide"}, model, {"adamw": adamw(model, 1e-4, 1e-2)}, ema_decay=0.9)

    def loss(self, step: int, generator: torch.Generator) -> Loss:
        x = torch.randn(BATCH, WIDTH + 1, generator=generator)[self.own]
        return Loss((self.model(x) - x).square().mean(), ["noise"])


def wide_loop(steps: int, parallel: Parallel = ALONE) -> Loop:
    return Loop(Wide(parallel), Schedule(steps, warmup_steps=2), parallel)


def poison(loop: Loop, step: int) -> None:
    """Make the loss of a step, counted from 0, NaN."""
    loss_of = loop.stage.loss

    def poisoned(number: int, generator: torch.Generator) -> Loss:
        loss = loss_of(number, generator)
        return Loss(loss.value * math.nan, loss.samples) if number == step else loss

    loop.stage.loss = poisoned


@dataclass
class Training:
    """The processes of a training that has been started; their words are in out/words."""

    out: Path
    meeting: Path
    ranks: list[BaseProcess]

    @classmethod
    def start(cls, out: Path, steps: int, world: int = 2) -> "Training":
        out.mkdir(exist_ok=True)
        meeting = out / f"meeting-{time.monotonic_ns()}"
        ranks = [context().Process(target=_train, args=(rank, world, out, meeting, steps)) for rank in range(world)]
        for process in ranks:
            process.start()
        return cls(out, meeting, ranks)

    def wait_for(self, seen: Callable[[], bool]) -> bool:
        """Whether it is seen before the processes end."""
        while not seen():
            if all(process.exitcode is not None for process in self.ranks):
                return False
            time.sleep(0.0005)
        return True

    def all_train(self) -> bool:
        return all(_mark_of(self.meeting, rank).exists() for rank in range(len(self.ranks)))

    def is_saving(self) -> bool:
        return any((self.out / CHECKPOINTS).glob("*.partial/__*"))

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        for process in (self.ranks[rank] for rank in ranks):
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    def end(self) -> list[int]:
        """The exit codes; fails where a process does not end by itself."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        self.kill(*hanging)
        assert not hanging, "\n".join([f"ranks {hanging} wait for ever", *self.words()])
        return [process.exitcode or 0 for process in self.ranks]

    def words(self) -> list[str]:
        """What the processes said, and the others before them in this folder."""
        return (self.out / "words").read_text().splitlines()


def _mark_of(meeting: Path, rank: int) -> Path:
    return meeting.with_name(f"{meeting.name}-{rank}-trains")


def _train(rank: int, world: int, out: Path, meeting: Path, steps: int) -> None:
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    loop: Loop | None = None

    def left() -> str:
        return f"step {loop.saved if loop is not None else 0} is saved"

    try:
        with (
            (out / "words").open("a", buffering=1) as words,
            redirect_stderr(words),
            one_line_errors("training"),
            one_line_stop("training", left),
            processes(CPU, where=f"file://{meeting}") as parallel,
        ):
            faulthandler.dump_traceback_later(PATIENCE_SECONDS - 2, file=words)
            loop = wide_loop(steps, parallel)
            loss_of = loop.stage.loss

            def marked(step: int, generator: torch.Generator) -> Loss:
                _mark_of(meeting, rank).touch()
                return loss_of(step, generator)

            loop.stage.loss = marked
            loop.run(out, EVERY)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
