"""Time, floating-point operations, bytes and share of the roofline of each part of a step, as a table and a picture.

python -m bench.profile --clip 31x16x24 --attention nabla --thr 0.5 --out out/profile
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib
import torch
import typer
from matplotlib import pyplot

from bench.harness import machine
from bench.profile.parts import Part, Parts, Roof, RoofMeter
from bench.shaped_block import BlockInputs, block_inputs, shaped_block
from k5_command import stop_in_one_line
from k5kernels import TokenLayout
from k5kernels.attention import AttentionConfig
from k5kernels.device import choose_device
from k5kernels.presets import MODEL_SIZES
from k5kernels.terminal import DeviceName, console, one_line_errors, table
from model.crossdit import VisualBlock
from train.resident import reuse_memory

ROUNDS = 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALLEST_SHARE = 0.005  # of the step; what takes less is one row
NAME_LETTERS = 24


def profile(
    block: VisualBlock, inputs: BlockInputs, attention: AttentionConfig, backward: bool, meter: RoofMeter
) -> list[Part]:
    """Of one block's step, median times of the rounds, the longest part first. The meter measures in every round."""

    def step(enter: Callable[[str], object]) -> None:
        enter("forward")
        out = block(x, inputs.context(attention))
        if backward:
            enter("backward")
            torch.autograd.grad(out, [x, *block.parameters()], gradient, allow_unused=True)

    x = inputs.x.detach().requires_grad_(backward)
    gradient = torch.randn_like(x)
    rounds: list[Parts] = []
    with torch.set_grad_enabled(backward):
        step(str)  # warms up: kernels are compiled, masks of the layout are kept
        for _ in range(ROUNDS):
            meter.measure()
            with Parts(x.device, inputs.layout) as parts:
                step(parts.enter)
            rounds.append(parts)
    for key, part in rounds[0].found.items():
        part.seconds = median(one.found[key].seconds for one in rounds)
    return sorted(rounds[0].found.values(), key=lambda part: -part.seconds)


def rows(parts: list[Part], roof: Roof) -> list[list[str]]:
    """Cells of the table, and a last row of the whole step."""
    whole = sum(part.seconds for part in parts)
    shown = [part for part in parts if part.seconds >= SMALLEST_SHARE * whole]
    backward = len({part.phase for part in parts}) > 1
    cells = [
        _cells(_cut(f"{part.phase} {part.name}" if backward else part.name), [part], roof, whole) for part in shown
    ]
    if rest := parts[len(shown) :]:
        cells.append(_cells(f"{len(rest)} others", rest, roof, whole))
    return [*cells, _cells("whole", parts, roof, whole)]


def _cut(name: str) -> str:
    """So that the table fits a terminal of 80 columns; the file and the picture have the whole name."""
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 9]}…{name[-8:]}"


def _cells(name: str, parts: list[Part], roof: Roof, whole: float) -> list[str]:
    seconds = sum(part.seconds for part in parts)
    return [
        name,
        str(sum(part.calls for part in parts)),
        f"{1e3 * seconds:.1f}" if seconds < 1 else f"{1e3 * seconds:.0f}",
        f"{seconds / whole:.1%}",
        _rate(parts, seconds),
        f"{roof.share(parts):.0%}",
    ]


def _rate(parts: list[Part], seconds: float) -> str:
    """Of floating-point operations where the parts have any, else of bytes."""
    if operations := sum(part.operations for part in parts):
        return f"{operations / seconds / 1e9:.0f} GFLOP/s"
    return f"{sum(part.bytes for part in parts) / seconds / 1e9:.1f} GB/s"


def limit(parts: list[Part], roof: Roof) -> str:
    """How near the whole step is to what its limits alone would take, as one line."""
    seconds, least = sum(part.seconds for part in parts), sum(roof.least(part) for part in parts)
    return f"the step takes {seconds:.3g} s, its limits alone {least:.3g} s: {least / seconds:.1%} of the limit"


HEADER = ["part", "calls", "ms", "of step", "rate", "of limit"]


def draw(path: Path, title: str, parts: list[Part], roof: Roof) -> None:
    """A bar a part, as long as its time, filled as far as its roofline goes."""
    matplotlib.use("agg")
    whole = sum(part.seconds for part in parts)
    shown = [part for part in parts if part.seconds >= SMALLEST_SHARE * whole][::-1]
    names = [f"{part.phase} {part.name}" for part in shown]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(shown)))
    axes.barh(names, [1e3 * part.seconds for part in shown], color="lightgrey", label="time")
    axes.barh(names, [1e3 * roof.least(part) for part in shown], label="least time under the roof")
    axes.set(xlabel="ms", title=title)
    axes.legend(loc="lower right")
    figure.savefig(path, bbox_inches="tight", dpi=110)
    pyplot.close(figure)


def layout_of(clip: str) -> TokenLayout:
    """Of a clip as 31x16x24. Raises ValueError for other words."""
    sides = re.fullmatch(r"(\d+)[x×](\d+)[x×](\d+)", clip)
    if sides is None:
        raise ValueError(f"--clip: expected tokens as 31x16x24, got {clip!r}")
    T, H, W = (int(side) for side in sides.groups())
    return TokenLayout(((T, H, W),))


app = typer.Typer(add_completion=False)


@app.command()
def main(
    device: DeviceName = None,
    preset: Annotated[str, typer.Option(help=f"width of the block: {', '.join(MODEL_SIZES)}")] = "video_lite",
    clip: Annotated[str, typer.Option(help="tokens, T×H×W")] = "31x16x24",
    attention: Annotated[str, typer.Option(help="an engine: nabla, sdpa, auto …")] = "nabla",
    thr: Annotated[float, typer.Option(help="mass that NABLA keeps")] = 0.5,
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES))] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="gradients too")] = False,
    out: Annotated[Path, typer.Option(help="folder of profile.json and profile.png")] = Path("out/profile"),
) -> None:
    """Profile a visual block whose weights give attention a shape."""
    with one_line_errors("bench.profile"):
        if preset not in MODEL_SIZES or dtype not in DTYPES:
            raise ValueError(f"expected a preset of {list(MODEL_SIZES)} and a dtype of {list(DTYPES)}")
        reuse_memory(True)  # as in training; fresh pages take longer than the operators that fill them
        where, layout = choose_device(device), layout_of(clip)
        config = AttentionConfig(attention, thr=thr)
        block = shaped_block(MODEL_SIZES[preset]).to(where, DTYPES[dtype])
        inputs = block_inputs(MODEL_SIZES[preset], layout, where, DTYPES[dtype])
        meter = RoofMeter(where, DTYPES[dtype])
        parts = profile(block, inputs, config, backward, meter)
        roof = meter.roof()
        title = f"{preset} block, {attention}, S {layout.tokens}, {dtype}, {torch.get_num_threads()} threads"
        out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "step": title, "roof": asdict(roof), "parts": [asdict(part) for part in parts]}
        (out / "profile.json").write_text(json.dumps(found, indent=1))
        draw(out / "profile.png", title, parts, roof)
        limits = {
            "limits: product GFLOP/s": roof.operations / 1e9,
            "attention GFLOP/s": roof.attention / 1e9,
            "copy GB/s": roof.bandwidth / 1e9,
        }
        console().print(machine())
        console().print(table(title, HEADER, rows(parts, roof), limits))
        console().print(limit(parts, roof))


if __name__ == "__main__":
    stop_in_one_line("bench.profile")
    app()
