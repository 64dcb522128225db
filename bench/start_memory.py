"""The memory of a rank while a sharded model is made: layer by layer into shards, against the whole of it first.

    python -m bench.start_memory

gloo processes of this machine, each its own shard. What is measured is the most memory that a process has held (VmHWM),
over what it held before, of the rank with the most. Before it each has made a small model: what PyTorch loads of itself
with the first one is no part of it. Linux alone.
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
from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import console, table
from model.crossdit import CrossDiT
from model.presets import PRESETS
from train.building import build_model
from train.parallel import processes, shard_model
from train.resident import forget_peak, peak_bytes, resident_bytes

CPU = torch.device("cpu")
MODEL = replace(PRESETS["nano"], model_dim=768, time_dim=256, ff_dim=3072, text_blocks=2, visual_blocks=10)
SMALL = replace(MODEL, model_dim=64, time_dim=32, ff_dim=64, text_blocks=1, visual_blocks=1)
MIB = 2**20


def started(folder: Path, whole_first: bool) -> float:
    """MiB that the ranks' start takes at most."""

    def make(config: CrossDiTConfig) -> CrossDiT:
        if whole_first:
            torch.manual_seed(0)
            return shard_model(CrossDiT(config), parallel)
        return build_model(config, None, 0, parallel)

    with processes(CPU, where=f"file://{folder / 'store'}") as parallel:
        make(SMALL)
        forget_peak()
        before = resident_bytes()
        model = make(MODEL)
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
