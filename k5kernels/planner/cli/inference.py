"""`k5 plan inference`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import Unit, print_json, term_rows, write_csv
from k5kernels.planner.density import nabla_density
from k5kernels.planner.inference import (
    MAGCACHE_SKIPPED,
    Generation,
    HeldOut,
    generation_memory,
    generation_time,
    leave_one_out,
    mean_errors,
)
from k5kernels.planner.quantization import WEIGHT_BYTES
from k5kernels.planner.search import GIB
from k5kernels.planner.shapes import model_shape
from k5kernels.terminal import console, table

SECONDS, GIGABYTES = Unit("s"), Unit("GB", 1e9)  # the units of Table 5


def inference(
    preset: options.Preset = None,
    resolution: options.Resolution = None,
    frames: options.Frames = None,
    seconds: options.Seconds = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    cfg: Annotated[bool, typer.Option(help="Classifier-free guidance: two evaluations a step.")] = True,
    nabla_thr: options.NablaThr = None,
    magcache: Annotated[
        bool, typer.Option(help=f"MagCache as released: {MAGCACHE_SKIPPED:.0%} of the evaluations are skipped.")
    ] = False,
    offload: Annotated[bool, typer.Option(help="Whether idle parts wait in host memory.")] = True,
    text_encoder_dtype: Annotated[
        str, typer.Option(help=f"Of the text encoder's linear layers: {', '.join(WEIGHT_BYTES)}.")
    ] = "bfloat16",
    swapped: options.SwapBlocks = 0,
    memory: options.Memory = None,
    profile: options.ProfilePath = None,
    as_json: options.AsJSON = False,
    csv_path: options.CSVPath = None,
) -> None:
    """Time and memory of a generation, fitted to Table 5; without --preset, the errors of that, leaving one out."""
    if preset is None:
        _print_leave_one_out(as_json, csv_path)
        return
    hardware = options.hardware(profile)
    clip, nfe = options.clip_shape(resolution, frames, seconds), steps * (2 if cfg else 1)
    skipped = MAGCACHE_SKIPPED if magcache else 0.0
    card = options.card_bytes(memory, hardware)
    generation = Generation(model_shape(preset), clip, nfe, nabla_thr, skipped, offload, text_encoder_dtype, swapped)
    time, needed = generation_time(generation, profile=hardware), generation_memory(generation, card_bytes=card)
    inputs = {
        "preset": preset, **asdict(clip), "nfe": nfe, "nabla_thr": nabla_thr,
        "nabla_density": nabla_density(nabla_thr), "skipped": skipped, "offload": offload,
        "text_encoder_dtype": text_encoder_dtype, "swapped": swapped, "memory_bytes": card, "profile": hardware.name,
    }  # fmt: skip
    totals = {"total_s": time.total_s, "total_bytes": needed.total_bytes}
    write_csv(csv_path, [{**inputs, **asdict(time), **asdict(needed), **totals}])
    if as_json:
        print_json("inference", inputs, {"time": asdict(time), "memory": asdict(needed), **totals})
        return
    terminal, header = console(), ["term", "formula"]
    rows = term_rows(time, time.total_s, SECONDS)
    terminal.print(table(f"Generation on {hardware.name}", [*header, SECONDS.name], rows, inputs))
    rows = term_rows(needed, needed.total_bytes, GIGABYTES)
    title = "Memory: the largest part, and what stays beside it"
    terminal.print(table(title, [*header, GIGABYTES.name], rows))
    verdict = "fits" if needed.total_bytes <= card else "does not fit"
    terminal.print(f"{verdict} in {card / GIGABYTES.size:.1f} GB ({card / GIB:.0f} GiB)")


def _print_leave_one_out(as_json: bool, csv_path: Path | None) -> None:
    """Every row of Table 5 and what a fit to all the others says of it."""
    held_out = leave_one_out()
    rows = [_figures(each) for each in held_out]
    write_csv(csv_path, rows)
    time, memory = mean_errors(held_out)
    if as_json:
        means = {"mean_time_error": time, "mean_memory_error": memory}
        print_json("inference", {}, {"leave_one_out": rows, **means})
        return
    header = ["Table 5", "clip", "s", "fit", "off", "GB", "fit", "off"]
    caption = {"mean error of time": f"{time:.1%}", "of memory": f"{memory:.1%}"}
    console().print(table("Each row predicted from the others", header, [_cells(row) for row in rows], caption))


def _figures(each: HeldOut) -> dict[str, Any]:
    row = each.row
    return {
        "model": row.model, "variant": row.variant, **asdict(row.generation.clip), "nfe": row.generation.nfe,
        "seconds": row.seconds, "predicted_s": each.seconds, "time_error": each.time_error,
        "memory_bytes": row.memory_bytes, "predicted_bytes": each.memory_bytes, "memory_error": each.memory_error,
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['model']} {row['variant']}", f"{row['height']}×{row['width']}×{row['frames']}",
        f"{row['seconds']:,.0f}", f"{row['predicted_s']:,.0f}", f"{row['time_error']:+.0%}",
        f"{row['memory_bytes'] / 1e9:.0f}", f"{row['predicted_bytes'] / 1e9:.1f}", f"{row['memory_error']:+.0%}",
    ]  # fmt: skip
