"""What a training would take, printed before it runs: in this process on its data, or a whole stage on a cluster."""

from dataclasses import asdict

import typer

from k5kernels.planner import HardwareProfile, Memory
from k5kernels.planner.candidates import Problem
from k5kernels.planner.extensions import Extensions
from k5kernels.planner.search import search
from k5kernels.planner.shapes import ClipShape, ModelShape
from k5kernels.planner.values import term_words
from k5kernels.planner.workload import Workload
from model.presets import PRESETS
from train.prediction import GIB, Run, nearest_layout, predicted_memory, predicted_ms
from train.settings import Settings, resolution

HOURS_A_DAY = 24
MOST_GPUS = 1024


class DoesNotFitError(ValueError):
    """The run takes more memory than the machine has."""


def print_run(planned: Run, profile: HardwareProfile) -> None:
    """Print what the planner says of the run. Raises DoesNotFitError, which names the nearest layout, where it cannot
    fit.
    """
    memory = predicted_memory(planned)
    if planned.processes.gpus > 1:
        typer.echo(f"layout: {planned.processes}")
    typer.echo(f"on {profile.name}: a step takes {predicted_ms(planned, profile):,.1f} ms")
    typer.echo(f"memory {memory.total_bytes / GIB:,.2f} of {profile.memory_bytes / GIB:,.2f} GiB: {_terms(memory)}")
    if memory.total_bytes > profile.memory_bytes:
        raise DoesNotFitError(
            f"does not fit: {memory.total_bytes / GIB:,.2f} GiB, expected at most "
            f"{profile.memory_bytes / GIB:,.2f} GiB of {profile.name}; {nearest_layout(planned, profile)}"
        )


def print_stage_layout(settings: Settings, profile: HardwareProfile, gpus: int) -> None:
    """Print the layout of the stage's steps on clips that takes the fewest GPU-hours, by the planner.

    Raises ValueError as `workload_of`, NothingFitsError where no layout is possible.
    """
    problem = Problem(
        workload_of(settings),
        gpus,
        profile.memory_bytes,
        extensions=Extensions(ema=True, buffers=True),
        profile=profile,
    )
    best = search(problem, keep=1).best
    typer.echo(f"{settings.name} on {profile.name}: {best.layout}")
    typer.echo(
        f"a step takes {best.step.total_ms / 1e3:,.2f} s; {settings.steps:,} steps "
        f"{best.wall_hours / HOURS_A_DAY:,.1f} days, {best.gpu_hours:,.0f} GPU-hours"
    )
    total, limit = best.memory.total_bytes / GIB, profile.memory_bytes / GIB
    typer.echo(f"memory {total:,.2f} of {limit:,.2f} GiB a GPU: {_terms(best.memory)}")


def workload_of(settings: Settings) -> Workload:
    """What the stage trains on in its steps on clips, or on images where it trains on nothing else.

    Raises ValueError where the settings leave the sizes to the data.
    """
    if settings.resolutions is None:
        raise ValueError("resolutions: expected those to plan for, got none: give --latents to plan for their sizes")
    frames = 1 if settings.training.image_share == 1 else settings.frames
    if frames is None:
        raise ValueError("frames: expected those of a clip to plan for, got null: give --latents to plan for theirs")
    clips = [(ClipShape(*resolution(size), frames), weight) for size, weight in settings.resolutions.items()]
    model = ModelShape.of(PRESETS[settings.preset])
    return Workload(model, tuple(clips), settings.batch, settings.steps, settings.nabla_thr)


def _terms(memory: Memory[float]) -> str:
    return ", ".join(f"{term_words(name)} {size / GIB:,.2f}" for name, size in asdict(memory).items() if size)
