"""The `k5` command: `k5 info`, `k5 plan …` (k5kernels/planner/cli), `k5 encode`.

What a user can get wrong ends in one line on stderr: exit code 2 where the command line is, 1 where its values or
files are.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from k5kernels.planner.cli import plan
from k5kernels.terminal import DeviceName, complain, console, one_line_errors, table

app = typer.Typer(help="Kandinsky 5.0 on this machine.", no_args_is_help=True, add_completion=False)
app.add_typer(plan, name="plan")


@app.command()
@one_line_errors()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """What this machine can run, and which kernel serves which operator."""
    from k5kernels.info import machine

    found = machine()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    terminal = console()
    terminal.print(", ".join(f"{name} {number}" for name, number in found.versions.items() if number))
    cpu = found.cpu
    terminal.print(
        f"CPU: {cpu.threads} threads, C++ kernels {cpu.instruction_set or 'not built'}, PyTorch {cpu.torch_capability}"
    )
    terminal.print(f"GPU: {', '.join(found.gpus) or 'none'}")
    here = ("cpu", "cuda") if found.gpus else ("cpu",)
    operators = [[o.name, o.device, o.kernel, o.reason] for o in found.operators if o.device in here]
    terminal.print(table("Operators", ["k5::", "device", "kernel", "why"], operators))
    engines = [[engine.name, "yes" if engine.available else "no", engine.reason] for engine in found.engines]
    terminal.print(table("Attention engines", ["engine", "usable", "why"], engines))


@app.command()
@one_line_errors()
def encode(
    videos: Annotated[list[Path], typer.Argument(help="Video files, and folders of them.")],
    vae: Annotated[Path, typer.Option(help="Weights: a safetensors file, or a VAE folder of diffusers.")],
    out: Annotated[str, typer.Option(help="Folder for the shards, or its URL (s3://…).")],
    resolution: Annotated[int, typer.Option(help="Class of the buckets: 256, 512 or 1024.")] = 256,
    clip_frames: Annotated[int, typer.Option(help="Frames of a clip: 1 + a multiple of 4.")] = 25,
    device: DeviceName = None,
) -> None:
    """Encode videos into shards of latents."""
    from rich.markup import escape
    from rich.progress import Progress

    from k5kernels.device import choose_device
    from k5kernels.latents.encode import encode_videos
    from k5kernels.vae.weights import load_encoder

    chosen = choose_device(device)
    encoder = load_encoder(vae).to(chosen)
    terminal = console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        bar = bars.add_task("", total=None)

        def progress(source: str, done: int, frames: int) -> None:
            bars.update(bar, description=escape(Path(source).name), completed=done, total=frames or None)

        summary = encode_videos(videos, encoder, out, resolution=resolution, clip_frames=clip_frames, progress=progress)
    typer.echo(f"{out}: {summary.samples} clips in {summary.shards} shards, {summary.shards_kept} kept from before")
    for failure in summary.failures.values():
        complain(failure)
    if summary.failures:
        raise typer.Exit(1)
