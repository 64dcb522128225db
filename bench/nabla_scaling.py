"""Time and memory of attention against the number of tokens: NABLA at a fixed density, and dense attention.

python -m bench.nabla_scaling --out docs
"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Row, machine, measure, memory_in_words
from bench.nabla_tokens import tokens_alike_in_blocks
from k5_command import stop_in_one_line
from k5kernels import BlockMask, TokenLayout, nabla_attention, nabla_mask
from train.resident import peak_bytes, reuse_memory

# Videos of 512×768 pixels (32×48 tokens a latent frame), up to ten seconds (93,696 tokens); smaller frames first.
LAYOUTS = [TokenLayout(((4, 16, 32),))] + [TokenLayout(((frames, 32, 48),)) for frames in (4, 8, 16, 31, 61)]
HEADS, DIM, DENSITY, SPREAD = 1, 64, 0.1, 1.0
ROUNDS = 5
CHECKED_TOKENS = 64
MIB = 2**20


def threshold_for(density: float, q: Tensor, k: Tensor, layout: TokenLayout) -> float:
    """The thr at which the mask has about this density."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if nabla_mask(q, k, layout, middle).density < density else (low, middle)
    return (low + high) / 2


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: BlockMask | None) -> Tensor:
    """Attention of a few queries in float64, [HEADS, rows, DIM]; over all keys where mask is None."""
    scores = (q[0, :, rows].double() @ k[0].double().mT) / DIM**0.5
    if mask is not None:
        starts = mask.layout.block_starts()
        blocks = torch.bucketize(torch.arange(mask.layout.tokens), starts, right=True) - 1
        scores = scores.masked_fill(~mask.to_dense()[0][:, blocks[rows]][:, :, blocks], -torch.inf)
    return scores.softmax(-1) @ v[0].double()


def added_bytes(call) -> int:
    """How far the peak resident memory of this process rises during a call."""
    reuse_memory(False)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = peak_bytes()
    call()
    return peak_bytes() - before


def compare_at(layout: TokenLayout) -> tuple[Row, dict[str, int], float]:
    """Times, added memory by variant, and the density."""
    torch.manual_seed(0)
    q, k, v = tokens_alike_in_blocks(layout, HEADS, DIM, SPREAD)
    thr = threshold_for(DENSITY, q, k, layout)
    mask = nabla_mask(q, k, layout, thr)
    rows = torch.randint(layout.tokens, (CHECKED_TOKENS,))
    truths = {"NABLA": exact_rows(q, k, v, rows, mask), "dense SDPA": exact_rows(q, k, v, rows, None)}
    calls = {
        "NABLA": lambda: nabla_attention(q, k, v, layout, thr),
        "dense SDPA": lambda: scaled_dot_product_attention(q, k, v),
    }

    def check(named_output: tuple[str, Tensor]) -> None:
        name, output = named_output
        torch.testing.assert_close(output[0, :, rows].double(), truths[name], rtol=0, atol=1e-5)

    memory = {name: added_bytes(call) for name, call in calls.items()}
    reuse_memory(True)
    variants = {name: lambda name=name, call=call: (name, call()) for name, call in calls.items()}
    sizes = f"S {layout.tokens}, {HEADS} head of {DIM}, density {mask.density:.0%}"
    return measure("scaling", sizes, variants, check, rounds=ROUNDS), memory, mask.density


def draw(points: list[dict], path: Path) -> None:
    """Two panels over the number of tokens: seconds, and MiB beyond the inputs."""
    matplotlib.use("Agg")
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    tokens = [point["tokens"] for point in points]
    for panel, key, unit in ((panels[0], "milliseconds", 1e3), (panels[1], "added_bytes", MIB)):
        for name in points[0][key]:
            panel.plot(tokens, [point[key][name] / unit for point in points], marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="tokens")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("seconds a call")
    panels[1].set_ylabel("MiB beyond the inputs")
    figure.suptitle(f"NABLA attention at density {DENSITY:.0%} and dense attention, float32, {HEADS} head of {DIM}")
    figure.savefig(path, dpi=110)


def main(out: Annotated[Path, typer.Option(help="Folder for nabla_scaling.json and nabla_scaling.png.")]) -> None:
    """Measure every size, print a table, write the figures and the plot."""
    console, points = Console(), []
    table = Table("tokens", "density", "NABLA [ms]", "dense [ms]", "ratio (quartiles)", "NABLA [MiB]", "dense [MiB]")
    with console.status("") as status:
        for layout in LAYOUTS:
            status.update(f"{layout.tokens} tokens")
            row, memory, density = compare_at(layout)
            medians = row.medians()
            points.append(
                {
                    "tokens": layout.tokens,
                    "density": density,
                    "milliseconds": medians,
                    "ratio_quartiles": row.ratios("dense SDPA"),
                    "added_bytes": memory,
                }
            )
            low, middle, high = row.ratios("dense SDPA")
            table.add_row(
                f"{layout.tokens:,}",
                f"{density:.1%}",
                *(f"{median:,.1f}" for median in medians.values()),
                f"{middle:.1f}x ({low:.1f} to {high:.1f})",
                *(f"{added / MIB:,.1f}" for added in memory.values()),
            )
    console.print(table)
    console.print(f"{machine()}; {ROUNDS} interleaved rounds; {memory_in_words()}", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "threads": torch.get_num_threads(), "points": points}
    (out / "nabla_scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(points, out / "nabla_scaling.png")


if __name__ == "__main__":
    stop_in_one_line("bench.nabla_scaling")
    typer.run(main)
