"""Train CrossDiT on latent shards in one process.

    torchrun -m train.run --latents runs/latents --init model/nano/crossdit.safetensors --out runs/first --steps 200

Writes `log.jsonl`, `checkpoint.pt` (the same command goes on from it) and, when done, `crossdit.safetensors`
with the averaged weights. Every row of the log has the planner's prediction beside what was measured; `--dry-run`
prints the prediction and trains nothing, `--profile` says for which machine.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.attention.nabla import record_block_masks
from k5kernels.device import choose_device
from k5kernels.planner import H100, HardwareProfile, load_profile
from k5kernels.planner.density import nabla_density
from k5kernels.planner.values import term_words
from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import DeviceName, complain, one_line_errors
from model.crossdit import CrossDiT
from model.presets import PRESETS
from model.text_encoders import MiniLMTextEncoder
from model.weights import load_crossdit, read_crossdit_config, save_crossdit
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.latents import LatentSet, read_shards
from train.loop import Loop
from train.prediction import GIB, Run, nearest_layout, predicted_memory, predicted_ms
from train.resident import peak_bytes, resident_bytes
from train.schedule import Schedule

PROGRAM = "train.run"
WEIGHTS = "crossdit.safetensors"
TEXT_WIDTH = 384  # of MiniLM's tokens
STA_WINDOW = (11, 3, 3)
MLP_WIDENING = 4  # of the released models


def model_config(preset: str, init: Path | None, model_dim: int | None, blocks: int | None) -> CrossDiTConfig:
    """The config of the weights to start from, or the preset's, with another width or depth where given."""
    if init is not None:
        if model_dim is not None or blocks is not None:
            raise typer.BadParameter("the weights of --init have their own sizes: leave out --model-dim and --blocks")
        return read_crossdit_config(init)
    if preset not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {preset}", param_hint="--preset")
    config = PRESETS[preset]
    if config.in_text_dim != TEXT_WIDTH:
        raise typer.BadParameter(
            f"expected nano: {preset} takes text of width {config.in_text_dim}, this trainer's encoder gives "
            f"{TEXT_WIDTH}",
            param_hint="--preset",
        )
    if model_dim is not None:
        if model_dim % config.head_dim:
            raise typer.BadParameter(
                f"expected a multiple of the head dim {config.head_dim}, got {model_dim}", param_hint="--model-dim"
            )
        config = replace(config, model_dim=model_dim, ff_dim=MLP_WIDENING * model_dim)
    return config if blocks is None else replace(config, visual_blocks=blocks)


def build_model(
    config: CrossDiTConfig, init: Path | None, checkpointing: bool, seed: int, device: torch.device
) -> CrossDiT:
    """Random weights, or weights from a file."""
    torch.manual_seed(seed)
    model = load_crossdit(init) if init is not None else CrossDiT(config)
    model.gradient_checkpointing = checkpointing
    return model.to(device)


def dry_run(planned: Run, profile: HardwareProfile) -> None:
    """Print what the planner says of the run. Raises typer.Exit(1), after one line on stderr, where it cannot fit."""
    memory = predicted_memory(planned)
    typer.echo(f"on {profile.name}: a step takes {predicted_ms(planned, profile):,.1f} ms")
    terms = ", ".join(f"{term_words(name)} {size / GIB:,.2f}" for name, size in asdict(memory).items() if size)
    typer.echo(f"memory {memory.total_bytes / GIB:,.2f} of {profile.memory_bytes / GIB:,.2f} GiB: {terms}")
    if memory.total_bytes > profile.memory_bytes:
        complain(
            f"does not fit: {memory.total_bytes / GIB:,.2f} GiB, expected at most "
            f"{profile.memory_bytes / GIB:,.2f} GiB of {profile.name}; {nearest_layout(planned, profile)}",
            PROGRAM,
        )
        raise typer.Exit(1)


def save_averaged(stage: CrossDiTStage, out: Path) -> None:
    """Let the model take the averaged weights, and write them to the folder in float16."""
    stage.average.copy_to(stage.model)
    save_crossdit(out / WEIGHTS, stage.model, torch.float16)


def train(stage: CrossDiTStage, schedule: Schedule, out: Path, every: int, prediction: dict[str, Any]) -> None:
    """Train to the end of the schedule and write the averaged weights.

    prediction: goes into every row of the log, beside the memory and the density that were measured.
    """
    densities: list[float] = []

    def measure() -> dict[str, Any]:
        density = round(fmean(densities or [1.0]), 4)
        densities.clear()
        return {"peak_bytes": peak_bytes(stage.device), "density": density, **prediction}

    with record_block_masks(lambda mask: densities.append(mask.density)):
        Loop(stage, schedule).run(out, every, measure)
    save_averaged(stage, out)


def main(
    latents: Annotated[Path, typer.Option(help="folder of latent shards (*.tar)")],
    out: Annotated[Path, typer.Option(help="folder for the log, the checkpoint and the weights")],
    steps: Annotated[int, typer.Option(help="steps of the whole schedule")],
    preset: str = "nano",
    init: Annotated[Path | None, typer.Option(help="start from these weights instead of random ones")] = None,
    model_dim: Annotated[
        int | None, typer.Option(min=1, help="width instead of the preset's, MLP 4 times as wide")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="CrossDiT blocks instead of the preset's")] = None,
    captions: Annotated[Path | None, typer.Option(help="JSON: source file's stem -> caption")] = None,
    batch: int = 1,
    latent_frames: Annotated[int | None, typer.Option(help="keep the first so many latent frames")] = None,
    learning_rate: float = 1e-4,
    warmup_steps: int = 100,
    decay_steps: int = 0,
    ema_decay: float = 0.9999,
    nabla_thr: Annotated[float | None, typer.Option(help="NABLA attention at this threshold; dense without")] = None,
    nabla_window: Annotated[bool, typer.Option(help="unite NABLA's mask with the 11×3×3 window of blocks")] = True,
    checkpointing: Annotated[bool, typer.Option(help="recompute each block in the backward pass")] = True,
    bf16: bool = False,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="steps between log rows and checkpoints")] = 50,
    profile: Annotated[
        Path | None, typer.Option(help="hardware profile of the predictions, by k5 plan calibrate; H100 without")
    ] = None,
    dry_run_only: Annotated[
        bool, typer.Option("--dry-run", help="print the predicted time and memory, and refuse what cannot fit")
    ] = False,
    device: DeviceName = None,
) -> None:
    """Train, or go on."""
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise typer.BadParameter("this trainer runs in one process: use --nproc-per-node 1")
    attention = DENSE
    if nabla_thr is not None:
        attention = AttentionConfig("nabla", nabla_thr, STA_WINDOW if nabla_window else None)
    schedule = Schedule(steps, warmup_steps, decay_steps, seed=seed)
    config = FlowMatching(
        batch=batch,
        latent_frames=latent_frames,
        learning_rate=learning_rate,
        ema_decay=ema_decay,
        attention=attention,
        bf16=bf16,
    )
    with one_line_errors(PROGRAM):
        chosen = choose_device(device)
        hardware = H100 if profile is None else load_profile(profile)
        sizes = model_config(preset, init, model_dim, blocks)
        data = LatentSet(read_shards(latents), json.loads(captions.read_text()) if captions else {})
    planned = Run(sizes, config, data.grids, checkpointing, nabla_density(nabla_thr))
    if dry_run_only:
        dry_run(planned, hardware)
        return
    encode_text = MiniLMTextEncoder(chosen).encode
    base = resident_bytes(chosen)
    prediction = {
        "predicted_ms": float(f"{predicted_ms(planned, hardware):.4g}"),
        "predicted_bytes": round(base + predicted_memory(planned).total_bytes),
        "base_bytes": base,
        "profile": hardware.name,
    }
    model = build_model(sizes, init, checkpointing, seed, chosen)
    train(CrossDiTStage(model, data, encode_text, config), schedule, out, every, prediction)


if __name__ == "__main__":
    typer.run(main)
