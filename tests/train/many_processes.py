"""What the tests of parallel training run in several processes; a module that each of them can load."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from bench.gloo_processes import FORKSERVER
from bench.train_equality import MODEL, NABLA, model
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.text_condition import TextCondition
from k5kernels.token_layout import TokenLayout
from train import run
from train.parallel import SequenceExchange, processes

CPU = torch.device("cpu")
PACKED = ((1, 5, 7), (2, 4, 3), (1, 3, 3))  # 68 tokens; a piece begins or ends inside a clip
SAMPLES, TEXT_TOKENS, TEXT_WIDTH = 2, 3, 384
Fault = Callable[[int], None]


def packed_differences(folder: Path) -> list[float]:
    """Of the output and of the gradient of several clips in one sequence that all ranks share, relative."""
    differences = []
    with processes(CPU, sequence=int(os.environ["WORLD_SIZE"]), where=f"file://{folder}/store") as parallel:
        for attention in (DENSE, NABLA):
            output, gradient = _packed(attention, None)
            shared, part = _packed(attention, parallel.exchange)
            dist.all_reduce(part)
            part /= parallel.world  # as fully_shard averages
            differences += [((a - b).norm() / b.norm()).item() for a, b in ((shared, output), (part, gradient))]
    return differences


def _packed(attention: AttentionConfig, exchange: SequenceExchange | None) -> tuple[Tensor, Tensor]:
    layout, generator = TokenLayout(PACKED), torch.Generator().manual_seed(0)
    rows, made = SAMPLES * len(PACKED), model()
    made.exchange = exchange
    x = torch.randn(SAMPLES, layout.tokens, MODEL.patch_cells * MODEL.input_channels, generator=generator)
    tokens = torch.randn(rows, TEXT_TOKENS, MODEL.in_text_dim, generator=generator)
    mask = torch.arange(TEXT_TOKENS) <= torch.arange(rows)[:, None] % TEXT_TOKENS
    time = torch.linspace(0, 1000, rows)
    output = made(x, time, TextCondition(tokens, mask, tokens.mean(1)), layout, attention=attention)
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


def run_on(world: int, command: list[str], folder: Path, fault: Fault | None = None) -> list[tuple[int | None, str]]:
    """`train.run` on processes that nobody ends: of each the exit code, None after a minute, and its stderr.

    fault: called in each process with its rank, before the command.
    """
    # Of torchrun's agent, which outlives the processes.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    started = []
    for rank in range(world):
        arguments = (rank, world, store.port, command, folder / f"stderr{rank}", fault)
        started.append(get_context(FORKSERVER).Process(target=_run, args=arguments))
        started[-1].start()
    for process in started:
        process.join(60)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return [(code, (folder / f"stderr{rank}").read_text()) for rank, code in enumerate(codes)]


def _run(rank: int, world: int, port: int, command: list[str], stderr: Path, fault: Fault | None) -> None:
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    run.MiniLMTextEncoder = lambda device: SimpleNamespace(encode=_encode_text)
    if fault is not None:
        fault(rank)
    app = typer.Typer()
    app.command()(run.main)
    sys.argv = ["train.run"]
    app(command)


def _encode_text(captions: list[str]) -> TextCondition:
    tokens = torch.zeros(len(captions), TEXT_TOKENS, TEXT_WIDTH)
    return TextCondition(tokens, None, tokens.mean(1))


def second_rank_raises(rank: int) -> None:
    """In its first step, when the other is in a collective."""
    if rank == 1:

        def loss(*arguments: object) -> None:
            raise ValueError("a fault of rank 1")

        run.CrossDiTStage.loss = loss


def second_rank_is_killed(rank: int) -> None:
    """In its first step, when the other is in a collective."""
    if rank == 1:
        run.CrossDiTStage.loss = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
