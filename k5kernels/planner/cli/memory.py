"""`k5 plan memory`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from k5kernels.planner import plots
from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import GIBIBYTES, print_terms
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.memory import REPORT_TERMS, layout_memory, memory_terms
from k5kernels.planner.search import GIB
from k5kernels.planner.shapes import parameters

PLOTTED_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def memory(
    preset: options.Preset = None,
    model_dim: options.ModelDim = None,
    time_dim: options.TimeDim = None,
    ff_dim: options.FFDim = None,
    blocks: options.Blocks = None,
    resolution: options.Resolution = None,
    frames: options.Frames = None,
    seconds: options.Seconds = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="S: visual tokens of a clip.")] = None,
    batch: options.Batch = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the states, N.")] = 1,
    offload: options.Offload = False,
    shards: options.Shards = None,
    replicas: options.Replicas = 1,
    sp: options.SP = 1,
    accumulation: options.Accumulation = 1,
    checkpointing: options.Checkpointing = True,
    optimizer_dtype: options.OptimizerDType = "float32",
    profile: options.ProfilePath = None,
    as_json: options.AsJSON = False,
    csv_path: options.CSVPath = None,
    plot: options.PlotPath = None,
) -> None:
    """Memory of a training step on each GPU: the report's formula, or with --shards every term of a layout."""
    title = "Memory of a GPU"
    if shards is None:
        options.only_with_shards(
            replicas=replicas != 1, sp=sp != 1, accumulation=accumulation != 1, no_checkpointing=not checkpointing,
            optimizer_dtype=optimizer_dtype != "float32", profile=profile is not None,
        )  # fmt: skip
        model = options.model_numbers(preset, model_dim=model_dim, time_dim=time_dim, ff_dim=ff_dim, blocks=blocks)
        held = batch * options.clip_size("tokens", tokens, resolution, frames, seconds)
        inputs: dict[str, Any] = {**model, "tokens": held, "gpus": gpus, "offload": offload}
        inputs["parameters"] = parameters(**model)
        terms = memory_terms(**model, tokens=held, gpus=gpus, offload=offload)
        if plot is not None:
            _draw(
                plot, title, gpus, PLOTTED_GPUS, lambda n, off: memory_terms(**model, tokens=held, gpus=n, offload=off)
            )
        print_terms("memory", title, inputs, terms, GIBIBYTES, as_json, csv_path, REPORT_TERMS)
        return
    if tokens is not None or gpus != 1:
        raise typer.BadParameter("--tokens, --gpus: a layout has a clip and --shards × --replicas GPUs instead")
    hardware = options.hardware(profile)
    layout = ClusterLayout(shards, replicas, sp, batch, accumulation, checkpointing, offload)
    numbers = {"model_dim": model_dim, "time_dim": time_dim, "ff_dim": ff_dim, "blocks": blocks}
    clip = options.clip_shape(resolution, frames, seconds)
    problem = options.layout_problem(preset, numbers, clip, layout, hardware, None, optimizer_dtype)

    def memory_at(shards: int, offload: bool) -> Any:
        changed = replace(layout, shards=shards, offload=offload)
        return layout_memory(problem.workload, changed, problem.extensions, hardware)

    given = options.layout_inputs(problem, layout)
    if plot is not None:
        counts = [n for n in PLOTTED_GPUS if n * replicas % sp == 0]
        _draw(plot, f"{title}, {layout}", shards, counts, memory_at)
    print_terms("memory", title, given, memory_at(shards, offload), GIBIBYTES, as_json, csv_path)


def _draw(path: Path, title: str, at: int, gpus: Sequence[int], memory_at: Callable[[int, bool], Any]) -> None:
    """Memory against the GPUs that share the states, with and without offload; the answer's number is marked."""
    lines = {
        name: [float(memory_at(n, offload).total_bytes) / GIB for n in gpus]
        for name, offload in (("offload", True), ("no offload", False))
    }
    plots.draw_lines(path, title, ("GPUs that share the states", gpus), "GiB", lines, at)
