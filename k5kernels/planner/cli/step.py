"""`k5 plan step`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from k5kernels.planner import plots
from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import MS, print_terms
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.layout_step import LayoutStepTime, layout_step_time
from k5kernels.planner.shapes import TOKEN_PIXELS, ClipShape
from k5kernels.planner.step import StepTime, step_time_terms

PLOTTED_CLIPS = tuple(ClipShape(512, 768, frames) for frames in (1, 5, 9, 17, 33, 61, 121, 181, 241))

StepAt = Callable[[ClipShape], StepTime | LayoutStepTime]


def step(
    preset: options.Preset = None,
    model_dim: options.ModelDim = None,
    time_dim: options.TimeDim = None,
    ff_dim: options.FFDim = None,
    blocks: options.Blocks = None,
    resolution: options.Resolution = None,
    frames: options.Frames = None,
    seconds: options.Seconds = None,
    pixels: Annotated[
        int | None, typer.Option(min=1, help="Height · width · latent frames, instead of a clip.")
    ] = None,
    batch: options.Batch = 1,
    shards: options.Shards = None,
    replicas: options.Replicas = 1,
    sp: options.SP = 1,
    accumulation: options.Accumulation = 1,
    checkpointing: options.Checkpointing = True,
    offload: options.Offload = False,
    nabla_thr: options.NablaThr = None,
    profile: options.ProfilePath = None,
    as_json: options.AsJSON = False,
    csv_path: options.CSVPath = None,
    plot: options.PlotPath = None,
) -> None:
    """Time of a training step, in ms: the report's formula, or with --shards every term of a layout."""
    hardware = options.hardware(profile)
    title = f"Training step on {hardware.name}"
    if shards is None:
        options.only_with(
            "--shards", time_dim=time_dim is not None, ff_dim=ff_dim is not None, replicas=replicas != 1, sp=sp != 1,
            accumulation=accumulation != 1, nabla_thr=nabla_thr is not None, offload=offload,
            no_checkpointing=not checkpointing,
        )  # fmt: skip
        model = options.model_numbers(preset, model_dim=model_dim, blocks=blocks)
        size = options.clip_size("pixels", pixels, resolution, frames, seconds)
        inputs: dict[str, Any] = {**model, "pixels": size, "batch": batch, "profile": hardware.name}
        terms = step_time_terms(**model, pixels=size, batch=batch, profile=hardware)
        if plot is not None:
            _draw(
                plot,
                title,
                size,
                lambda clip: step_time_terms(**model, pixels=clip.pixels, batch=batch, profile=hardware),
            )
        print_terms("step", title, inputs, terms, MS, as_json, csv_path)
        return
    if pixels is not None:
        raise typer.BadParameter("--pixels: a layout needs the clip: give --resolution and --frames or --seconds")
    layout = ClusterLayout(shards, replicas, sp, batch, accumulation, checkpointing, offload)
    numbers = {"model_dim": model_dim, "time_dim": time_dim, "ff_dim": ff_dim, "blocks": blocks}
    clip = options.clip_shape(resolution, frames, seconds)
    problem = options.layout_problem(preset, numbers, clip, layout, hardware, nabla_thr)

    def step_at(clip: ClipShape) -> LayoutStepTime:
        workload = replace(problem.workload, clips=((clip, 1.0),))
        return layout_step_time(workload, layout, problem.extensions, hardware)

    if plot is not None:
        _draw(plot, f"{title}, {layout}", clip.pixels, step_at)
    print_terms("step", title, options.layout_inputs(problem, layout), step_at(clip), MS, as_json, csv_path)


def _draw(path: Path, title: str, pixels: int, step_at: StepAt) -> None:
    """Step time against tokens, by clips of growing length at 512 × 768; the answer's size is marked."""
    terms = [step_at(clip) for clip in PLOTTED_CLIPS]
    lines = {
        "step": [float(one.total_ms) for one in terms],
        "full attention": [float(one.attention_ms) for one in terms],
    }
    tokens = ("visual tokens of a clip", [clip.tokens for clip in PLOTTED_CLIPS])
    plots.draw_lines(path, title, tokens, "ms", lines, pixels / TOKEN_PIXELS)
