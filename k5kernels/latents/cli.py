"""`k5 encode`.

Exit code 0: all is encoded. 1: some sources failed, or the job ended early; the same command goes on. 2: refused, as
arguments do not fit, or the folder is another job's or is being written to.
"""

from pathlib import Path
from typing import Annotated

import typer

from k5kernels.terminal import DeviceName, complain, console, one_line_errors, one_line_stop, table


def print_presets(asked: bool) -> None:
    """What --list-presets does: it needs none of the other arguments."""
    if asked:
        from k5kernels.latents.presets import presets

        header = ["preset", "height×width", "frames", "frames/s", "a shard", "stages (Table 4)"]
        rows = [
            [
                one.name,
                " ".join(f"{height}×{width}" for height, width in one.buckets),
                str(one.clip_frames),
                one.fps,
                str(one.samples_per_shard),
                one.stages,
            ]
            for one in presets().values()
        ]
        console().print(table("Presets of k5 encode", header, rows))
        raise typer.Exit


def encode(
    videos: Annotated[list[str], typer.Argument(help="Videos and pictures, and folders of them, or URLs (s3://…).")],
    vae: Annotated[
        Path, typer.Option(help="Weights: a safetensors file, or a VAE folder of diffusers; also FLUX's, for pictures.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the shards, or its URL (s3://…).")],
    preset: Annotated[
        str | None,
        typer.Option(help="Buckets, lengths and shards of a stage, by name; an option given beside it goes before it."),
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="Print the presets and end.", callback=print_presets, is_eager=True)
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(help="Class of the buckets: 256, 512 or 1024.", show_default="256")
    ] = None,
    clip_frames: Annotated[
        int | None,
        typer.Option(help="Frames of a clip: 1 + a multiple of 4; 1 for image stages.", show_default="25"),
    ] = None,
    fps: Annotated[
        str | None,
        typer.Option(
            help="Frames a second, resampled by time stamps; or source, for every frame as it is.", show_default="24"
        ),
    ] = None,
    samples_per_shard: Annotated[
        int | None, typer.Option(help="Clips a shard; the last one of a run may have fewer.", show_default="16")
    ] = None,
    background: Annotated[
        str, typer.Option(help="Colour behind what is transparent: black, white, grey or #rrggbb.")
    ] = "black",
    captions: Annotated[
        Path | None,
        typer.Option(help="JSON, JSONL or CSV of captions by path or name; clip.txt beside clip.mp4 needs no option."),
    ] = None,
    text_embeddings: Annotated[
        str | None,
        typer.Option(
            help="Store captions as a text encoder gives them: minilm, or QWEN,CLIP: folders or hub names.",
        ),
    ] = None,
    index: Annotated[int, typer.Option(help="Number of this process, from 0, where several share the work.")] = 0,
    of: Annotated[int, typer.Option(help="How many processes share the work, on one machine or many.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what another job left in the folder.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try sources again whose content could not be used.")
    ] = False,
    mode: Annotated[str, typer.Option(help="How a clip goes through the encoder: exact, stream or tile.")] = "stream",
    memory_budget: Annotated[
        float | None, typer.Option(help="GiB that the encoder's activations may take; none: as much as they need.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What the encoder computes in: float32, bfloat16 or float16.",
            show_default="bfloat16 on a GPU, float32 on a CPU",
        ),
    ] = None,
    decoders: Annotated[
        int | None,
        typer.Option(
            help="Sources that are read at once, beside the encoder.",
            show_default="2 on a CPU; on a GPU half the cores, 2 to 8",
        ),
    ] = None,
    device: DeviceName = None,
) -> None:
    """Encode videos and pictures into shards of latents; the same command goes on where it was stopped."""
    left = f"{out}: the same command goes on from what is finished"
    with one_line_stop("k5", lambda: left), one_line_errors(refused=2):
        from k5kernels.device import choose_device
        from k5kernels.latents.ahead import threads_beside
        from k5kernels.latents.captions import read_captions
        from k5kernels.latents.display import display, left_out
        from k5kernels.latents.encode import checked_mode, encoder_dtype
        from k5kernels.latents.encoders import load
        from k5kernels.latents.job import encode_videos
        from k5kernels.latents.presets import SMALL, named_preset
        from k5kernels.latents.video import Reading, parse_colour, parse_fps
        from k5kernels.text_encoders import load_text_encoder

        chosen = choose_device(device)
        base = SMALL if preset is None else named_preset(preset)
        reading = Reading(fps=parse_fps(fps or base.fps), background=parse_colour(background))
        given = None if captions is None else read_captions(captions)
        encoder = load(vae, chosen, encoder_dtype(dtype, chosen))
        text_encoder = None if text_embeddings is None else load_text_encoder(text_embeddings, chosen)
        terminal = console(stderr=True)

        def tell_captions(captioned: int, sources: int) -> None:
            if captioned:
                terminal.print(f"{captioned} of {sources} sources have a caption")

        with display(terminal) as progress:
            summary = encode_videos(
                videos,
                encoder,
                out,
                resolution=base.resolution if resolution is None else resolution,
                clip_frames=base.clip_frames if clip_frames is None else clip_frames,
                samples_per_shard=base.samples_per_shard if samples_per_shard is None else samples_per_shard,
                reading=reading,
                text_encoder=text_encoder,
                mode=checked_mode(mode),
                memory_budget=None if memory_budget is None else round(memory_budget * 2**30),
                index=index,
                of=of,
                overwrite=overwrite,
                retry_failed=retry_failed,
                decoders=threads_beside(chosen) if decoders is None else decoders,
                captions=given,
                on_captions=tell_captions,
                progress=progress,
            )
    for line in left_out(summary):
        terminal.print(line, soft_wrap=True)
    if summary.seconds.encode:
        terminal.print(str(summary.seconds))
    typer.echo(f"{out}: {summary.samples} clips in {summary.shards} shards, {summary.shards_kept} kept from before")
    for failure in summary.failures.values():
        complain(failure)
    if summary.failures:
        raise typer.Exit(1)
