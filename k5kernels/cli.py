"""The `k5` command: `k5 info`, `k5 plan step`, `k5 plan memory`, `k5 encode`.

What a user can get wrong ends in one line on stderr: exit code 2 where the command line is, 1 where its values or
files are.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from k5kernels import planner

app = typer.Typer(help="Kandinsky 5.0 on this machine.", no_args_is_help=True, add_completion=False)
plan = typer.Typer(help="What a training step takes, by the report's formulas (§7.3).", no_args_is_help=True)
app.add_typer(plan, name="plan")

GIB = 2**30

Preset = Annotated[str | None, typer.Option(help=f"Released model: {', '.join(planner.MODELS)}.")]
ModelDim = Annotated[int | None, typer.Option(min=1, help="Width of the tokens, d.")]
TimeDim = Annotated[int | None, typer.Option(min=1, help="Width of the time embedding, d_t.")]
FFDim = Annotated[int | None, typer.Option(min=1, help="Width of the MLP, d_f.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="CrossDiT blocks, L.")]
Resolution = Annotated[str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Pixels, multiples of 16: 512x768.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Video frames of a clip: 1 (an image) or 1 + a multiple of 4.")]
Seconds = Annotated[float | None, typer.Option(help="Length of a clip at 24 frames a second, instead of --frames.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr and exit code 1 on an error the user can mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        _complain(error)
        raise typer.Exit(1) from None


@app.command()
@one_line_errors()
def info(as_json: AsJSON = False) -> None:
    """What this machine can run, and which kernel serves which operator."""
    from k5kernels.info import machine

    found = machine()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    console = _console()
    console.print(", ".join(f"{name} {number}" for name, number in found.versions.items() if number))
    cpu = found.cpu
    console.print(
        f"CPU: {cpu.threads} threads, C++ kernels {cpu.instruction_set or 'not built'}, PyTorch {cpu.torch_capability}"
    )
    console.print(f"GPU: {', '.join(found.gpus) or 'none'}")
    here = ("cpu", "cuda") if found.gpus else ("cpu",)
    operators = [[o.name, o.device, o.kernel, o.reason] for o in found.operators if o.device in here]
    console.print(_table("Operators", ["k5::", "device", "kernel", "why"], operators))
    engines = [[engine.name, "yes" if engine.available else "no", engine.reason] for engine in found.engines]
    console.print(_table("Attention engines", ["engine", "usable", "why"], engines))


@plan.command("step")
@one_line_errors()
def plan_step(
    preset: Preset = None,
    model_dim: ModelDim = None,
    blocks: Blocks = None,
    resolution: Resolution = None,
    frames: Frames = None,
    seconds: Seconds = None,
    pixels: Annotated[
        int | None, typer.Option(min=1, help="Height · width · latent frames, instead of a clip.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips on a GPU, B.")] = 1,
    as_json: AsJSON = False,
) -> None:
    """Time of a training step on an H100, in ms."""
    inputs: dict[str, Any] = _model(preset, model_dim=model_dim, blocks=blocks)
    inputs |= {"pixels": _size("pixels", pixels, resolution, frames, seconds), "batch": batch}
    terms = planner.step_time_terms(**inputs)
    if as_json:
        _print_json(inputs, terms, {"total_ms": terms.total_ms})
        return
    rows = [[*_labels(term), f"{value:,.1f}", f"{value / terms.total_ms:.0%}"] for term, value in _terms(terms)]
    rows.append(["total", "", f"{terms.total_ms:,.1f}", ""])
    _console().print(_table("Training step on an H100", ["term", "formula", "ms", "share"], rows, inputs))


@plan.command("memory")
@one_line_errors()
def plan_memory(
    preset: Preset = None,
    model_dim: ModelDim = None,
    time_dim: TimeDim = None,
    ff_dim: FFDim = None,
    blocks: Blocks = None,
    resolution: Resolution = None,
    frames: Frames = None,
    seconds: Seconds = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="S: visual tokens of a clip.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips on a GPU.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the states, N.")] = 1,
    offload: Annotated[bool, typer.Option(help="Whether block inputs go to host memory.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Memory of a training step on each GPU."""
    inputs: dict[str, Any] = _model(preset, model_dim=model_dim, time_dim=time_dim, ff_dim=ff_dim, blocks=blocks)
    parameters = planner.parameters(**inputs)
    tokens = batch * _size("tokens", tokens, resolution, frames, seconds)
    inputs |= {"tokens": tokens, "gpus": gpus, "offload": offload}
    terms = planner.memory_terms(**inputs)
    if as_json:
        totals = {"activations_bytes": terms.activations_bytes, "total_bytes": terms.total_bytes}
        _print_json(inputs | {"parameters": parameters}, terms, totals)
        return
    rows = [[*_labels(term), f"{value / GIB:,.2f}"] for term, value in _terms(terms)]
    gradients_peak = terms.gradients_bytes > terms.activations_bytes
    peak = "gradients" if gradients_peak else "block inputs + block activations"
    rows.append(["total", f"states + {peak}", f"{terms.total_bytes / GIB:,.2f}"])
    _console().print(
        _table("Memory of a GPU", ["term", "formula", "GiB"], rows, inputs | {"P": f"{parameters / 1e9:.2f} B"})
    )


@app.command()
@one_line_errors()
def encode(
    videos: Annotated[list[Path], typer.Argument(help="Video files, and folders of them.")],
    vae: Annotated[Path, typer.Option(help="Weights: a safetensors file, or a VAE folder of diffusers.")],
    out: Annotated[str, typer.Option(help="Folder for the shards, or its URL (s3://…).")],
    resolution: Annotated[int, typer.Option(help="Class of the buckets: 256, 512 or 1024.")] = 256,
    clip_frames: Annotated[int, typer.Option(help="Frames of a clip: 1 + a multiple of 4.")] = 25,
) -> None:
    """Encode videos into shards of latents."""
    import torch
    from rich.markup import escape
    from rich.progress import Progress

    from k5kernels.encode import encode_videos
    from k5kernels.vae.weights import load_encoder

    encoder = load_encoder(vae).to("cuda" if torch.cuda.is_available() else "cpu")
    console = _console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=None)

        def progress(source: str, done: int, frames: int) -> None:
            bars.update(bar, description=escape(Path(source).name), completed=done, total=frames or None)

        summary = encode_videos(videos, encoder, out, resolution=resolution, clip_frames=clip_frames, progress=progress)
    typer.echo(f"{out}: {summary.samples} clips in {summary.shards} shards, {summary.shards_kept} kept from before")
    for failure in summary.failures.values():
        _complain(failure)
    if summary.failures:
        raise typer.Exit(1)


def _console(stderr: bool = False) -> Console:
    """Prints text as it is: square brackets in it are not markup."""
    return Console(stderr=stderr, markup=False, highlight=False)


def _complain(message: object) -> None:
    typer.echo(f"k5: {' '.join(str(message).split())}", err=True)


def _model(preset: str | None, **given: int | None) -> dict[str, int]:
    """The model's numbers: those given, the others from the preset."""
    known = asdict(planner.model_shape(preset)) if preset is not None else {}
    numbers = {name: known.get(name) if value is None else value for name, value in given.items()}
    if missing := [_option(name) for name, value in numbers.items() if value is None]:
        raise typer.BadParameter(f"give {', '.join(missing)}, or a --preset: {', '.join(planner.MODELS)}")
    return {name: value for name, value in numbers.items() if value is not None}


def _size(
    kind: Literal["pixels", "tokens"],
    number: int | None,
    resolution: str | None,
    frames: int | None,
    seconds: float | None,
) -> int:
    """Pixels or tokens of a clip: the number where it was given alone, else those of the clip described."""
    if number is not None and resolution is None and frames is None and seconds is None:
        return number
    counts = [] if frames is None else [frames]
    if seconds is not None:
        counts.append(planner.frames_for(seconds))
    if number is not None or resolution is None or len(counts) != 1:
        raise typer.BadParameter(f"give --resolution and either --frames or --seconds, or --{kind} alone")
    height, _, width = resolution.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise typer.BadParameter(f"--resolution: expected HEIGHTxWIDTH, like 512x768, got {resolution!r}")
    clip = planner.ClipShape(int(height), int(width), counts[0])
    return clip.pixels if kind == "pixels" else clip.tokens


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _terms(terms: planner.StepTime | planner.Memory) -> list[tuple[Any, float]]:
    return [(field, getattr(terms, field.name)) for field in fields(terms)]


def _labels(term: Any) -> list[str]:
    """A term's name in words, without its unit, and its formula."""
    return [" ".join(term.name.split("_")[:-1]), term.metadata["formula"]]


def _print_json(inputs: dict[str, Any], terms: planner.StepTime | planner.Memory, totals: dict[str, float]) -> None:
    typer.echo(json.dumps({"inputs": inputs, "terms": asdict(terms), **totals}, indent=2))


def _table(title: str, header: list[str], rows: list[list[str]], inputs: dict[str, Any] | None = None) -> Table:
    """A table of text; inputs, where given, stand below it."""
    caption = ", ".join(f"{name} {value}" for name, value in (inputs or {}).items()) or None
    table = Table(*header, title=title, title_justify="left", caption=caption, caption_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
