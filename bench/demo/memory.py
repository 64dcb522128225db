"""Peak memory of one training step, measured in a process of its own.

python -m bench.demo.memory --grid 7 32 48 --device cpu --checkpointing
"""

import json
import subprocess
import sys
from typing import Annotated

import torch
import typer

from k5_command import stop_in_one_line
from k5kernels.device import choose_device
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from model.flow_matching import flow_matching_loss
from model.presets import PRESETS
from train.resident import peak_bytes, reuse_memory


def main(
    grid: Annotated[tuple[int, int, int], typer.Option(help="latent frames, height, width")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")],
    checkpointing: Annotated[bool, typer.Option(help="recompute each block in the backward")] = False,
) -> None:
    """One forward and backward of nano with random weights; prints the bytes it added to the device's memory."""
    chosen = choose_device(device)
    model = CrossDiT(PRESETS["nano"]).to(chosen)
    model.gradient_checkpointing = checkpointing
    config = model.config
    tokens, pooled = torch.randn(1, 16, config.in_text_dim), torch.randn(1, config.in_text_dim2)
    text = TextCondition(tokens.to(chosen), None, pooled.to(chosen))
    latents = torch.randn(1, *grid, config.in_visual_dim).to(chosen)
    before = peak_bytes(chosen)
    flow_matching_loss(model, latents, text, torch.Generator().manual_seed(0)).backward()
    print(json.dumps({"peak_bytes": peak_bytes(chosen) - before}))


def measure(grid: tuple[int, int, int], device: torch.device, *flags: str) -> int:
    """Run this module in a fresh process; the bytes it reports."""
    command = [sys.executable, "-m", "bench.demo.memory", "--grid", *map(str, grid), "--device", str(device), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"ended with status {done.returncode}"]
        raise ChildProcessError(f"the memory of a training step could not be measured: {said[0]}")
    return json.loads(done.stdout)["peak_bytes"]


if __name__ == "__main__":
    stop_in_one_line("bench.demo.memory")
    reuse_memory(False)  # so that the peak counts live tensors, not freed memory kept for reuse
    typer.run(main)
