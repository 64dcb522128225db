"""Memory of a training step over its time, with block inputs kept and with block inputs offloaded (Figure 17).

    python -m bench.memory_trace --out docs       writes docs/offload_memory.png and docs/offload_memory.json

Every allocation of a tensor on the CPU is counted by PyTorch's profiler, from the forward of the blocks to the end of
their backward. Weights and the room for their gradients are there before, and not counted; nor are block inputs that
offload has mapped from its file for the backward.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.harness import machine
from k5_command import stop_in_one_line
from k5kernels.atomic import replacing
from k5kernels.offload import ActivationOffload
from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from model.latent_tokens import latent_velocity

BLOCKS = 16
GRID = (8, 24, 32)  # of the latent: 1536 tokens
MIB = 2**20


@dataclass(frozen=True)
class Trace:
    """milliseconds: when memory changed, from the start of the step. bytes: what the step held after each change."""

    name: str
    milliseconds: list[float]
    bytes: list[int]

    @property
    def peak(self) -> int:
        return max(self.bytes)


def small_model(blocks: int = BLOCKS, width: int = 128) -> CrossDiT:
    """A CrossDiT with checkpointed blocks whose inputs weigh, beside what one block keeps, as much as in the report's:
    most of the memory of a step is block inputs only where there are many blocks."""
    torch.manual_seed(0)
    config = CrossDiTConfig(
        model_dim=width, time_dim=32, ff_dim=4 * width, text_blocks=1, visual_blocks=blocks, axes_dims=(16, 24, 24),
        in_text_dim=64, in_text_dim2=64,
    )  # fmt: skip
    model = CrossDiT(config)
    with torch.no_grad():  # modulation starts at zero, which would hide a wrong gradient
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.gradient_checkpointing = True
    return model


def step_of(model: CrossDiT, grid: tuple[int, int, int] = GRID) -> Callable[[], Tensor]:
    """Forward and backward on one clip; the gradients stand in the parameters."""
    random = torch.Generator().manual_seed(1)
    latent = torch.randn(1, *grid, model.config.input_channels, generator=random)
    text = TextCondition(torch.randn(1, 16, 64, generator=random), None, torch.randn(1, 64, generator=random))
    time = torch.tensor([500.0])

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = latent_velocity(model, latent, time, text).square().mean()
        loss.backward()
        return loss.detach()

    return step


def trace(name: str, step: Callable[[], Tensor]) -> Trace:
    """The memory of the second of two steps."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    kineto = profiled.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]")
    held, milliseconds, sizes = 0, [], []
    for when, nbytes in changes:
        held += nbytes
        milliseconds.append((when - changes[0][0]) / 1e6)
        sizes.append(held)
    return Trace(name, milliseconds, [size - min(0, min(sizes)) for size in sizes])


def figures(kept: Trace, offloaded: Trace, model: CrossDiT, grid: tuple[int, int, int] = GRID) -> dict[str, Any]:
    """What the picture says, in numbers."""
    one_input = grid[0] * (grid[1] // 2) * (grid[2] // 2) * model.config.model_dim * 4
    blocks = model.config.visual_blocks
    saved = kept.peak - offloaded.peak
    return {
        "blocks": blocks,
        "tokens": grid[0] * (grid[1] // 2) * (grid[2] // 2),
        "model_dim": model.config.model_dim,
        "block_input_bytes": one_input,
        "kept_peak_bytes": kept.peak,
        "offloaded_peak_bytes": offloaded.peak,
        "saved_bytes": saved,
        "saved_block_inputs": round(saved / one_input, 2),
        "peak_share": round(offloaded.peak / kept.peak, 3),
        "torch": torch.__version__,
        "machine": machine(),
    }


def draw(traces: list[Trace], path: Path) -> None:
    """Both traces, one above the other, on the same scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(traces), 1, sharex=True, sharey=True, figsize=(8, 4.5), layout="constrained")
    for axis, one in zip(axes, traces, strict=True):
        axis.fill_between(one.milliseconds, [size / MIB for size in one.bytes], step="post", linewidth=0)
        axis.axhline(one.peak / MIB, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{one.name}: peak {one.peak / MIB:,.0f} MiB", loc="left", fontsize=10)
        axis.set_ylabel("MiB")
    axes[-1].set_xlabel("ms of a training step")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def main(out: Annotated[Path, typer.Option(help="folder of the picture and its numbers")]) -> None:
    """Trace both, draw them, and print the numbers."""
    model = small_model()
    step = step_of(model)
    kept = trace("checkpointing", step)
    with tempfile.TemporaryDirectory() as folder:
        model.offload = ActivationOffload(folder, min_bytes=1)
        offloaded = trace("checkpointing with offload", step)
        model.offload.close()
    found = figures(kept, offloaded, model)
    out.mkdir(parents=True, exist_ok=True)
    draw([kept, offloaded], out / "offload_memory.png")
    with replacing(out / "offload_memory.json") as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    stop_in_one_line("bench.memory_trace")
    typer.run(main)
