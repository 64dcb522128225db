"""`k5 plan search`."""

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from k5kernels.planner import plots
from k5kernels.planner import search as planner
from k5kernels.planner.candidates import Problem
from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import print_json, write_csv
from k5kernels.planner.density import nabla_density
from k5kernels.planner.explain import alternatives, why_best
from k5kernels.planner.extensions import FULL
from k5kernels.planner.shapes import model_shape
from k5kernels.planner.stages import stage, stages
from k5kernels.planner.workload import Workload
from k5kernels.terminal import console, table


def search(
    gpus: Annotated[int, typer.Option(min=1, help="GPUs there are, at most.")],
    table4_stage: Annotated[
        str | None, typer.Option("--stage", help="Stage of Table 4; `k5 plan stages` lists them.")
    ] = None,
    preset: options.Preset = None,
    mix: Annotated[
        list[str] | None, typer.Option(help="HEIGHTxWIDTH[:WEIGHT], instead of a stage; may be given several times.")
    ] = None,
    frames: options.Frames = None,
    seconds: options.Seconds = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips of an optimizer step; the stage's without.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the stage's without.")] = None,
    nabla_thr: options.NablaThr = None,
    memory: options.Memory = None,
    optimizer_dtype: options.OptimizerDType = "float32",
    goal: Annotated[str, typer.Option(help=f"What is to be least: {', '.join(planner.GOALS)}.")] = "gpu-hours",
    tolerance: Annotated[
        float, typer.Option(help="Share by which the clips of a step may differ from the batch.")
    ] = 0.05,
    keep: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 5,
    profile: options.ProfilePath = None,
    as_json: options.AsJSON = False,
    csv_path: options.CSVPath = None,
    plot: options.PlotPath = None,
) -> None:
    """The best layout of a training on the GPUs there are, why it is best, and why the obvious others lose."""
    hardware = options.hardware(profile)
    workload = _training(table4_stage, preset, mix, frames, seconds, batch, steps, nabla_thr)
    limit = options.card_bytes(memory, hardware)
    extensions = replace(FULL, optimizer_dtype=optimizer_dtype)
    result = planner.search(Problem(workload, gpus, limit, tolerance, extensions, hardware), goal, keep)
    inputs = {
        "training": table4_stage or preset, "batch": workload.batch, "steps": workload.steps, "gpus": gpus,
        "memory_bytes": limit, "goal": goal, "batch_tolerance": tolerance,
        "nabla_density": nabla_density(workload.nabla_thr), "optimizer_dtype": optimizer_dtype,
        "profile": hardware.name,
    }  # fmt: skip
    write_csv(csv_path, _ranked(result))
    if plot is not None:
        plots.draw_pareto(plot, f"{inputs['training']}, at most {gpus} GPUs of {limit / planner.GIB:.0f} GiB", result)
    if as_json:
        print_json("search", inputs, _json(result))
    else:
        _print(result, f"{inputs['training']} on at most {gpus} GPUs of {limit / planner.GIB:.0f} GiB: best for {goal}")


def _training(
    table4_stage: str | None,
    preset: str | None,
    mix: list[str] | None,
    frames: int | None,
    seconds: float | None,
    batch: int | None,
    steps: int | None,
    nabla_thr: float | None,
) -> Workload:
    """A stage of Table 4, or a model on a mix of sizes; what is given replaces what the stage says."""
    if (table4_stage is None) == (not mix):
        raise typer.BadParameter(f"give either --stage ({', '.join(stages())}) or --mix with --preset and --frames")
    given = {"batch": batch, "steps": steps, "nabla_thr": nabla_thr}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if table4_stage is not None:
        if preset is not None or frames is not None or seconds is not None:
            raise typer.BadParameter("--stage: has its model and length; leave out --preset, --frames and --seconds")
        return replace(stage(table4_stage), **changed)
    if preset is None or batch is None:
        raise typer.BadParameter("--mix: give --preset and --batch too")
    sizes = []
    for each in mix or []:
        size, _, weight = each.partition(":")
        try:
            share = float(weight or 1)
        except ValueError:
            raise typer.BadParameter(f"--mix: expected HEIGHTxWIDTH:WEIGHT, like 512x768:0.5, got {each!r}") from None
        sizes.append((options.clip_shape(size, frames, seconds), share))
    return Workload(model_shape(preset), tuple(sizes), **changed)


def _ranked(result: planner.SearchResult) -> list[dict[str, Any]]:
    return [{"rank": number, **_plan(each)} for number, each in enumerate(result.ranked, 1)]


def _plan(each: planner.Plan) -> dict[str, Any]:
    layout = each.layout
    return {
        **asdict(layout), "gpus": layout.gpus, "batch": layout.batch, "layout_words": str(layout),
        "step_ms": each.step.total_ms, "gpu_hours": each.gpu_hours, "wall_hours": each.wall_hours,
        "memory_bytes": each.memory.total_bytes,
    }  # fmt: skip


def _json(result: planner.SearchResult) -> dict[str, Any]:
    return {
        "candidates": result.candidates,
        "possible": result.possible,
        "dropped": result.dropped,
        "ranked": _ranked(result),
        "pareto": [_plan(each) for each in result.pareto],
        "why_best": why_best(result),
        "alternatives": [
            {"name": other.name, "layout": asdict(other.layout), "verdict": other.verdict}
            for other in alternatives(result)
        ],
    }


def _print(result: planner.SearchResult, title: str) -> None:
    terminal = console()
    header = ["", "layout", "step [s]", "GPU-hours", "days", "memory [GiB]"]
    rows = [[str(number), str(each.layout), *_cells(each)] for number, each in enumerate(result.ranked, 1)]
    caption = {"candidates": f"{result.candidates:,}", "possible": f"{result.possible:,}"}
    terminal.print(table(title, header, rows, caption))
    terminal.print(f"Why the first: {why_best(result)}")
    others = [[other.name, other.verdict] for other in alternatives(result)]
    terminal.print(table("The obvious others", ["choice", "against the best"], others))


def _cells(each: planner.Plan) -> list[str]:
    days, memory = each.wall_hours / 24, each.memory.total_bytes / planner.GIB
    return [f"{each.step.total_ms / 1e3:,.2f}", f"{each.gpu_hours:,.0f}", f"{days:,.1f}", f"{memory:.1f}"]
