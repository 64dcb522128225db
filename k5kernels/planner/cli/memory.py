"""`k5 plan memory`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from k5kernels.planner import plots
from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import GIBIBYTES, print_terms
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.lora import ADAPTER_BYTES, LAYERS, LORA_FORMULAS, Adapter, lora_memory
from k5kernels.planner.memory import LAYOUT_FORMULAS, REPORT_FORMULAS, Memory, layout_memory, memory_terms
from k5kernels.planner.quantization import WEIGHT_BYTES
from k5kernels.planner.search import GIB
from k5kernels.planner.shapes import ModelShape, parameters

PLOTTED_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TITLE = "Memory of a GPU"


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
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train a LoRA adapter of that rank on one GPU instead of the weights.")
    ] = None,
    lora_layers: Annotated[str, typer.Option(help="That learn: qkv of the attentions, or all linear layers.")] = LAYERS[
        0
    ],
    lora_dtype: Annotated[str, typer.Option(help=f"Of the adapter: {', '.join(ADAPTER_BYTES)}.")] = "bfloat16",
    base_dtype: Annotated[
        str, typer.Option(help=f"Of the weights beside the adapter: {', '.join(WEIGHT_BYTES)}.")
    ] = "bfloat16",
    swapped: options.SwapBlocks = 0,
    profile: options.ProfilePath = None,
    as_json: options.AsJSON = False,
    csv_path: options.CSVPath = None,
    plot: options.PlotPath = None,
) -> None:
    """Memory of a training step on each GPU: the report's formula, every term of a layout, or of a LoRA adapter."""
    numbers = {"model_dim": model_dim, "time_dim": time_dim, "ff_dim": ff_dim, "blocks": blocks}
    layout = ClusterLayout(1 if shards is None else shards, replicas, sp, batch, accumulation, checkpointing, offload)
    if lora_rank is None:
        options.only_with(
            "--lora-rank", lora_layers=lora_layers != LAYERS[0], lora_dtype=lora_dtype != "bfloat16",
            base_dtype=base_dtype != "bfloat16", swap_blocks=swapped != 0,
        )  # fmt: skip
    else:
        _one_gpu(layout, shards is not None or gpus != 1, plot)
        adapter = Adapter(lora_rank, lora_layers, lora_dtype, base_dtype, swapped, optimizer_dtype)
        model = options.model_numbers(preset, **numbers)
        held = batch * options.clip_size("tokens", tokens, resolution, frames, seconds)
        inputs = {**model, "tokens": held, "checkpointing": checkpointing, **asdict(adapter)}
        found = lora_memory(ModelShape(**model), adapter, held, checkpointing)
        title = "Memory of a GPU that trains an adapter"
        print_terms("memory", title, inputs, found, GIBIBYTES, as_json, csv_path, LORA_FORMULAS)
        return
    if shards is None:
        options.only_with(
            "--shards", replicas=replicas != 1, sp=sp != 1, accumulation=accumulation != 1,
            no_checkpointing=not checkpointing, optimizer_dtype=optimizer_dtype != "float32",
            profile=profile is not None,
        )  # fmt: skip
        held = batch * options.clip_size("tokens", tokens, resolution, frames, seconds)
        _plain(options.model_numbers(preset, **numbers), held, gpus, offload, as_json, csv_path, plot)
        return
    if tokens is not None or gpus != 1:
        raise typer.BadParameter("--tokens, --gpus: a layout has a clip and --shards × --replicas GPUs instead")
    hardware = options.hardware(profile)
    clip = options.clip_shape(resolution, frames, seconds)
    problem = options.layout_problem(preset, numbers, clip, layout, hardware, None, optimizer_dtype)

    def memory_at(shards: int, offload: bool) -> Memory[float]:
        changed = replace(layout, shards=shards, offload=offload)
        return layout_memory(problem.workload, changed, problem.extensions, hardware)

    if plot is not None:
        counts = [n for n in PLOTTED_GPUS if n * replicas % sp == 0]
        _draw(plot, f"{TITLE}, {layout}", shards, counts, memory_at)
    given = options.layout_inputs(problem, layout)
    print_terms("memory", TITLE, given, memory_at(shards, offload), GIBIBYTES, as_json, csv_path, LAYOUT_FORMULAS)


def _plain(
    model: dict[str, int],
    tokens: int,
    gpus: int,
    offload: bool,
    as_json: bool,
    csv_path: Path | None,
    plot: Path | None,
) -> None:
    """The report's formula."""

    def memory_at(gpus: int, offload: bool) -> Memory[float]:
        return memory_terms(**model, tokens=tokens, gpus=gpus, offload=offload)

    inputs: dict[str, Any] = {**model, "tokens": tokens, "gpus": gpus, "offload": offload}
    inputs["parameters"] = parameters(**model)
    terms = memory_at(gpus, offload)
    if plot is not None:
        _draw(plot, TITLE, gpus, PLOTTED_GPUS, memory_at)
    print_terms("memory", TITLE, inputs, terms, GIBIBYTES, as_json, csv_path, REPORT_FORMULAS)


def _one_gpu(layout: ClusterLayout, sharded: bool, plot: Path | None) -> None:
    """Refuses options that the memory of an adapter has no term for."""
    given = {
        "--shards, --gpus": sharded,
        "--replicas": layout.replicas != 1,
        "--sp": layout.sequence_parallel != 1,
        "--accumulation": layout.accumulation != 1,
        "--offload": layout.offload,
        "--plot": plot is not None,
    }
    if names := [name for name, there in given.items() if there]:
        raise typer.BadParameter(f"{', '.join(names)}: --lora-rank is for one GPU and has no such term; leave out")


def _draw(
    path: Path, title: str, at: int, gpus: Sequence[int], memory_at: Callable[[int, bool], Memory[float]]
) -> None:
    """Memory against the GPUs that share the states, with and without offload; the answer's number is marked."""
    lines = {
        name: [memory_at(n, offload).total_bytes / GIB for n in gpus]
        for name, offload in (("offload", True), ("no offload", False))
    }
    plots.draw_lines(path, title, ("GPUs that share the states", gpus), "GiB", lines, at)
