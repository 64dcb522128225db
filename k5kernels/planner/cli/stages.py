"""`k5 plan stages`."""

from dataclasses import asdict
from typing import Annotated

import typer

from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import print_json, write_csv
from k5kernels.planner.stages import StageCost, stage_costs
from k5kernels.terminal import console, table

TOTALLED = ("gpu_hours", "days", "nabla_gpu_hours", "nabla_days")


def stages(
    preset: Annotated[str | None, typer.Option(help="One model; all of Table 4 without.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share a step.")] = 64,
    profile: options.ProfilePath = None,
    as_json: options.AsJSON = False,
    csv_path: options.CSVPath = None,
) -> None:
    """Table 4: step time, GPU-hours and days of every stage by the step formula, dense and with NABLA."""
    hardware = options.hardware(profile)
    costs = stage_costs(preset, gpus, hardware)
    totals = {model: _total(costs, model) for model in dict.fromkeys(cost.model for cost in costs)}
    rows = [asdict(cost) for cost in costs]
    write_csv(csv_path, rows)
    if as_json:
        print_json("stages", {"gpus": gpus, "profile": hardware.name}, {"stages": rows, "totals": totals})
        return
    header = ["stage", "steps × batch", "step [s]", "GPU-hours", "days"]
    shown = [_cells(cost) for cost in costs] + [_total_cells(model, total) for model, total in totals.items()]
    console().print(table(f"Table 4 on {gpus} GPUs", header, shown, {"profile": hardware.name}))


def _total(costs: list[StageCost], model: str) -> dict[str, float]:
    return {key: sum(getattr(cost, key) for cost in costs if cost.model == model) for key in TOTALLED}


def _cells(cost: StageCost) -> list[str]:
    """The stage dense and, on a second line where it is sparse, with NABLA: five columns fit 80 characters."""
    dense = [f"{cost.step_s:,.1f}", f"{cost.gpu_hours:,.0f}", f"{cost.days:,.1f}"]
    nabla = [f"{cost.nabla_step_s:,.1f}", f"{cost.nabla_gpu_hours:,.0f}", f"{cost.nabla_days:,.1f}"]
    names = [cost.stage, f"{cost.steps:,} × {cost.batch:,}"]
    if cost.nabla_density == 1:
        return [*names, *dense]
    return [f"{names[0]}\n  NABLA, {cost.nabla_density:.0%}", names[1], *map("\n".join, zip(dense, nabla, strict=True))]


def _total_cells(model: str, total: dict[str, float]) -> list[str]:
    hours = [f"{total[f'{kind}gpu_hours']:,.0f}" for kind in ("", "nabla_")]
    days = [f"{total[f'{kind}days']:,.1f}" for kind in ("", "nabla_")]
    return [f"{model}, total\n  with NABLA", "", "", "\n".join(hours), "\n".join(days)]
