"""What the commands of `k5 plan` share of their options, and how those become the planner's objects."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from k5kernels.planner.candidates import Problem, broken_rule
from k5kernels.planner.checks import positive_number
from k5kernels.planner.cluster_layout import ClusterLayout, checked
from k5kernels.planner.density import nabla_density
from k5kernels.planner.extensions import FULL, OPTIMIZER_DTYPES
from k5kernels.planner.profile import H100, HardwareProfile, load_profile
from k5kernels.planner.search import GIB
from k5kernels.planner.shapes import MODELS, ClipShape, ModelShape, frames_for, model_shape
from k5kernels.planner.workload import Workload

Preset = Annotated[str | None, typer.Option(help=f"Released model: {', '.join(MODELS)}.")]
ModelDim = Annotated[int | None, typer.Option(min=1, help="Width of the tokens, d.")]
TimeDim = Annotated[int | None, typer.Option(min=1, help="Width of the time embedding, d_t.")]
FFDim = Annotated[int | None, typer.Option(min=1, help="Width of the MLP, d_f.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="CrossDiT blocks, L.")]
Resolution = Annotated[str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Pixels, multiples of 16: 512x768.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Video frames of a clip: 1 (an image) or 1 + a multiple of 4.")]
Seconds = Annotated[float | None, typer.Option(help="Length of a clip at 24 frames a second, instead of --frames.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips on a GPU, B; with --shards, of a group that shares them.")]
Shards = Annotated[int | None, typer.Option(min=1, help="GPUs that share the states; with it, all terms are shown.")]
Replicas = Annotated[int, typer.Option(min=1, help="Sets of shards.")]
SP = Annotated[int, typer.Option(min=1, help="GPUs that share a clip (sequence parallelism).")]
Accumulation = Annotated[int, typer.Option(min=1, help="Forwards of an optimizer step.")]
Checkpointing = Annotated[bool, typer.Option(help="Whether blocks are recomputed in the backward.")]
Offload = Annotated[bool, typer.Option(help="Whether block inputs go to host memory.")]
OptimizerDType = Annotated[str, typer.Option(help=f"Of the optimizer's moments: {', '.join(OPTIMIZER_DTYPES)}.")]
SwapBlocks = Annotated[int, typer.Option("--swap-blocks", min=0, help="Blocks that wait in host memory.")]
Memory = Annotated[float | None, typer.Option(help="Of a GPU, in GiB; the profile's without.")]
NablaThr = Annotated[float | None, typer.Option(help="thr of NABLA; its expected density scales the attention term.")]
ProfilePath = Annotated[Path | None, typer.Option("--profile", help="Hardware profile of `k5 plan calibrate`.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
CSVPath = Annotated[Path | None, typer.Option("--csv", help="Write the figures as CSV too.")]
PlotPath = Annotated[Path | None, typer.Option("--plot", help="Draw the answer: a .png or .svg file.")]

MODEL_FIELDS = ("model_dim", "time_dim", "ff_dim", "blocks")


def hardware(path: Path | None) -> HardwareProfile:
    """The profile of the file, the report's H100 without one."""
    return H100 if path is None else load_profile(path)


def card_bytes(memory: float | None, profile: HardwareProfile) -> float:
    """Memory of a GPU: of --memory in GiB, the profile's without."""
    return profile.memory_bytes if memory is None else positive_number("--memory", memory) * GIB


def model_numbers(preset: str | None, **given: int | None) -> dict[str, int]:
    """The model's numbers: those given, the others from the preset."""
    known = asdict(model_shape(preset)) if preset is not None else {}
    numbers = {name: known.get(name) if value is None else value for name, value in given.items()}
    if missing := [option(name) for name, value in numbers.items() if value is None]:
        raise typer.BadParameter(f"give {', '.join(missing)}, or a --preset: {', '.join(MODELS)}")
    return {name: value for name, value in numbers.items() if value is not None}


def clip_shape(resolution: str | None, frames: int | None, seconds: float | None) -> ClipShape:
    """The clip of --resolution and either --frames or --seconds."""
    counts = [] if frames is None else [frames]
    if seconds is not None:
        counts.append(frames_for(seconds))
    if resolution is None or len(counts) != 1:
        raise typer.BadParameter("give --resolution and either --frames or --seconds")
    return ClipShape(*sides("--resolution", resolution), counts[0])


def sides(name: str, text: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH, given to the option of that name."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise typer.BadParameter(f"{name}: expected HEIGHTxWIDTH, like 512x768, got {text!r}")
    return int(height), int(width)


def clip_size(
    kind: Literal["pixels", "tokens"],
    number: int | None,
    resolution: str | None,
    frames: int | None,
    seconds: float | None,
) -> int:
    """Pixels or tokens of a clip: the number where it was given alone, else those of the clip described."""
    if number is not None and resolution is None and frames is None and seconds is None:
        return number
    if number is not None or resolution is None or (frames is None) == (seconds is None):
        raise typer.BadParameter(f"give --resolution and either --frames or --seconds, or --{kind} alone")
    clip = clip_shape(resolution, frames, seconds)
    return clip.pixels if kind == "pixels" else clip.tokens


def only_with(needed: str, **given: bool) -> None:
    """Refuses options that have no meaning without the needed one."""
    if names := [option(name) for name, there in given.items() if there]:
        raise typer.BadParameter(f"{', '.join(names)}: the answer has no such term without {needed}; give that too")


def layout_problem(
    preset: str | None,
    numbers: dict[str, int | None],
    clip: ClipShape,
    layout: ClusterLayout,
    profile: HardwareProfile,
    nabla_thr: float | None = None,
    optimizer_dtype: str = "float32",
) -> Problem:
    """One clip size trained on one layout, with every term; ValueError where the layout cannot be.

    numbers: those of MODEL_FIELDS that were given; the preset has the others.
    """
    known = model_numbers(preset, **{name: numbers.get(name) for name in MODEL_FIELDS})
    model = replace(ModelShape(**known) if preset is None else model_shape(preset), **known)
    checked(layout)
    problem = Problem(
        Workload(model, ((clip, 1.0),), layout.batch, nabla_thr=nabla_thr),
        gpus=layout.gpus,
        memory_bytes=profile.memory_bytes,
        extensions=replace(FULL, optimizer_dtype=optimizer_dtype),
        profile=profile,
    )
    if (words := broken_rule(problem, layout)) is not None:
        raise ValueError(f"layout: {words}")
    return problem


def layout_inputs(problem: Problem, layout: ClusterLayout) -> dict[str, Any]:
    """What an answer on a layout was computed from."""
    workload, clip = problem.workload, problem.workload.clips[0][0]
    return {
        **asdict(workload.model), **asdict(clip), **asdict(layout), "gpus": layout.gpus,
        "nabla_density": nabla_density(workload.nabla_thr),
        "optimizer_dtype": problem.extensions.optimizer_dtype, "profile": problem.profile.name,
    }  # fmt: skip


def option(name: str) -> str:
    """A parameter's name on the command line."""
    return f"--{name.replace('_', '-')}"
