"""The pre-training stages of the report (Table 4) and what each costs by the step formula (§7.3.1)."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from k5kernels.planner.checks import one_of, positive_integer
from k5kernels.planner.density import nabla_density
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import MODELS, ClipShape
from k5kernels.planner.workload import Workload

MS_PER_HOUR = 3.6e6


@cache
def table_4() -> dict[str, dict[str, Any]]:
    """Table 4 and what the text beside it says of each stage (§5.4, §6.2), by the stage's name.

    A row has model, frames (of the longest clip), nabla_thr (None: full attention), steps, batch, learning_rate,
    weight_decay, tasks ("t2i", "t2v", "i2v", "editing" -> share) and resolutions ("height x width" -> weight).
    """
    return json.loads(files("k5kernels.planner").joinpath("table4.json").read_text())


@cache
def stages() -> dict[str, tuple[str, Workload]]:
    """Table 4: name of the stage -> (name of the model, workload). Every clip of a stage has its largest length."""
    return {name: (row["model"], _workload(row)) for name, row in table_4().items()}


def stage(name: str) -> Workload:
    """The workload of a stage of Table 4; ValueError where there is none of that name."""
    return stages()[one_of("stage", name, stages())][1]


def _workload(row: dict) -> Workload:
    clips = []
    for resolution, weight in row["resolutions"].items():
        height, width = resolution.split("x")
        clips.append((ClipShape(int(height), int(width), row["frames"]), weight))
    return Workload(MODELS[row["model"]], tuple(clips), row["batch"], row["steps"], row["nabla_thr"])


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage on `gpus` GPUs that share each step without loss.

    The plain fields are the report's formula, which has full attention. The `nabla` fields scale its attention term
    with the expected density of the mask; they are the same where the stage uses full attention.
    """

    stage: str
    model: str
    steps: int
    batch: int
    nabla_density: float
    gpus: int
    step_s: float
    gpu_hours: float
    days: float
    nabla_step_s: float
    nabla_gpu_hours: float
    nabla_days: float


def stage_costs(model: str | None = None, gpus: int = 64, profile: HardwareProfile = H100) -> list[StageCost]:
    """Cost of every stage of Table 4, or of those of one model.

    gpus: how many share a step. Raises ValueError where no stage trains that model or gpus is not positive.
    """
    positive_integer("gpus", gpus)
    names = dict.fromkeys(trained for trained, _ in stages().values())
    if model is not None:
        one_of("model", model, names)
    return [
        _cost(name, trained, workload, gpus, profile)
        for name, (trained, workload) in stages().items()
        if model in (None, trained)
    ]


def _cost(name: str, model: str, workload: Workload, gpus: int, profile: HardwareProfile) -> StageCost:
    attention, rest = workload.clip_time_ms(profile)
    density = nabla_density(workload.nabla_thr)
    steps = [(attention * kept + rest) * workload.batch for kept in (1.0, density)]
    hours = [step * workload.steps / MS_PER_HOUR for step in steps]
    return StageCost(
        stage=name,
        model=model,
        steps=workload.steps,
        batch=workload.batch,
        nabla_density=density,
        gpus=gpus,
        step_s=steps[0] / 1e3 / gpus,
        gpu_hours=hours[0],
        days=hours[0] / gpus / 24,
        nabla_step_s=steps[1] / 1e3 / gpus,
        nabla_gpu_hours=hours[1],
        nabla_days=hours[1] / gpus / 24,
    )
