"""Train CrossDiT on latent shards in one process.

    torchrun -m train.run --latents runs/latents --init model/nano/crossdit.safetensors --out runs/first --steps 200

Writes `log.jsonl`, `checkpoint.pt` (the same command goes on from it) and, when done, `crossdit.safetensors`
with the averaged weights.
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from model.config import DENSE, AttentionConfig
from model.crossdit import CrossDiT
from model.presets import PRESETS
from model.text_encoders import MiniLMTextEncoder
from model.weights import load_crossdit, save_crossdit
from train.latents import LatentSet, read_shards
from train.trainer import TrainConfig, Trainer

TEXT_WIDTH = 384  # of MiniLM's tokens


def build_model(preset: str, init: Path | None, checkpointing: bool, seed: int) -> CrossDiT:
    """A preset with random weights, or weights from a file."""
    torch.manual_seed(seed)
    if init is None and preset not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {preset}", param_hint="--preset")
    if init is None and PRESETS[preset].in_text_dim != TEXT_WIDTH:
        raise typer.BadParameter(
            f"expected nano: {preset} takes text of width {PRESETS[preset].in_text_dim}, this trainer's encoder gives "
            f"{TEXT_WIDTH}",
            param_hint="--preset",
        )
    model = load_crossdit(init) if init is not None else CrossDiT(PRESETS[preset])
    model.gradient_checkpointing = checkpointing
    return model


def run(trainer: Trainer, out: Path, every: int) -> None:
    """Train to the end of the configuration, from the folder's checkpoint where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    trainer.resume(out / "checkpoint.pt")
    losses: list[float] = []
    began = time.perf_counter()
    for _ in track(range(trainer.done, trainer.config.steps), description="training"):
        losses.append(trainer.step())
        if trainer.done % every == 0 or trainer.done == trainer.config.steps:
            mean = sum(losses) / len(losses)
            milliseconds = (time.perf_counter() - began) * 1e3 / len(losses)
            with (out / "log.jsonl").open("a") as log:
                print(
                    json.dumps({"step": trainer.done, "loss": round(mean, 5), "step_ms": round(milliseconds)}), file=log
                )
            trainer.save(out / "checkpoint.pt")
            losses, began = [], time.perf_counter()
    trainer.model.load_state_dict(trainer.ema, strict=False)
    save_crossdit(out / "crossdit.safetensors", trainer.model, torch.float16)


def main(
    latents: Annotated[Path, typer.Option(help="folder of latent shards (*.tar)")],
    out: Annotated[Path, typer.Option(help="folder for the log, the checkpoint and the weights")],
    steps: Annotated[int, typer.Option(help="steps of the whole schedule")],
    preset: str = "nano",
    init: Annotated[Path | None, typer.Option(help="start from these weights instead of random ones")] = None,
    captions: Annotated[Path | None, typer.Option(help="JSON: source file's stem -> caption")] = None,
    batch: int = 1,
    latent_frames: Annotated[int | None, typer.Option(help="keep the first so many latent frames")] = None,
    learning_rate: float = 1e-4,
    warmup_steps: int = 100,
    decay_steps: int = 0,
    ema_decay: float = 0.9999,
    nabla_thr: Annotated[float | None, typer.Option(help="NABLA attention at this threshold; dense without")] = None,
    checkpointing: Annotated[bool, typer.Option(help="recompute each block in the backward pass")] = True,
    bf16: bool = False,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="steps between log rows and checkpoints")] = 50,
) -> None:
    """Train, or go on."""
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise typer.BadParameter("this trainer runs in one process: use --nproc-per-node 1")
    config = TrainConfig(
        steps=steps,
        batch=batch,
        latent_frames=latent_frames,
        peak_learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        ema_decay=ema_decay,
        attention=DENSE if nabla_thr is None else AttentionConfig("nabla", nabla_thr, (11, 3, 3)),
        bf16=bf16,
        seed=seed,
    )
    data = LatentSet(read_shards(latents), json.loads(captions.read_text()) if captions else {})
    model = build_model(preset, init, checkpointing, seed)
    run(Trainer(model, data, MiniLMTextEncoder().encode, config), out, every)


if __name__ == "__main__":
    typer.run(main)
