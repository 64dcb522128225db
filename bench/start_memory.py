"""The memory of a rank while a sharded model is made: layer by layer into shards, against the whole of it first.

    python -m bench.start_memory

gloo processes of this machine, each its own shard. What is measured is the most memory that a process has held (VmHWM),
over what it held before, of the rank with the most.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from bench.gloo_processes import on_processes
from bench.harness import machine
from k5_command import stop_in_one_line
from k5kernels.terminal import console, table
from model.crossdit import CrossDiT
from model.presets import PRESETS
from train.building import build_model
from train.parallel import processes, shard_model
from train.resident import peak_bytes, resident_bytes

CPU = torch.device("cpu")
MODEL = replace(PRESETS["nano"], model_dim=768, time_dim=256, ff_dim=3072, text_blocks=2, visual_blocks=10)
MIB = 2**20


def started(folder: Path, whole_first: bool) -> float:
    """MiB that the ranks' start takes at most."""
    with processes(CPU, where=f"file://{folder / 'store'}") as parallel:
        before = resident_bytes()
        if whole_first:
            torch.manual_seed(0)
            model = shard_model(CrossDiT(MODEL), parallel)
        else:
            model = build_model(MODEL, None, 0, parallel)
        taken = torch.tensor(float(peak_bytes() - before))
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        del model
    return taken.item() / MIB


def main(most: Annotated[int, typer.Option(min=2, help="processes, at most")] = 4) -> None:
    """Print the table."""
    with torch.device("meta"):
        model = 4 * sum(parameter.numel() for parameter in CrossDiT(MODEL).parameters()) / MIB
    rows = []
    world = 2
    while world <= most:
        taken = [on_processes(world, started, whole_first) for whole_first in (True, False)]
        rows.append([str(world), *(f"{one:.0f}" for one in (model / world, *taken))])
        world *= 2
    header = ["processes", "shard", "whole model first", "layer by layer"]
    console().print(table(f"MiB of a rank's start; the model in float32: {model:.0f}", header, rows))
    console().print(machine())


if __name__ == "__main__":
    stop_in_one_line("bench.start_memory")
    typer.run(main)
