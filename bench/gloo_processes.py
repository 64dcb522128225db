"""Work on several gloo processes of this machine, as torchrun's ranks would do it, started in a moment.

The processes are forked from a server that has loaded PyTorch and this package once, and nothing else: they share no
threads and no state with the process that asks.
"""

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import torch.multiprocessing

# "train" quiets PyTorch before it is loaded. With the modules that PyTorch would else load in each process, when the
# first of them is used.
LOADED = ["train", "bench.harness", "train.crossdit_stage", "train.loop", "torch._dynamo", "torch.distributed.tensor"]
FORKSERVER: Final = "forkserver"
ANSWER = "answer.json"

Work = Callable[..., Any]


def on_processes(world: int, work: Work, *arguments: Any) -> Any:
    """What work(folder, *arguments) returns on rank 0, as JSON has it; it runs on all ranks, with one thread each.

    folder: an empty one that all ranks see. Raises torch.multiprocessing.ProcessRaisedException, with the traceback,
    where work raises on a rank; the others are then ended.
    """
    context()
    with TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _work, (world, Path(folder), work, arguments), nprocs=world, start_method=FORKSERVER
        )
        return json.loads((Path(folder) / ANSWER).read_text())


def context() -> ForkServerContext:
    """Starts processes that have loaded what the trainings need."""
    made = multiprocessing.get_context(FORKSERVER)
    made.set_forkserver_preload(LOADED)
    return made


def _work(rank: int, world: int, folder: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    answer = work(folder, *arguments)
    if rank == 0:
        (folder / ANSWER).write_text(json.dumps(answer))
