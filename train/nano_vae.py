"""Trains the nano VAE: HunyuanVideo's architecture at small widths, on three short clips.

    python -m train.nano_vae --out runs/nano_vae --steps 1400

The learning rate is constant over the first half, then falls to zero. Training runs under bf16 autocast, so the last
bits of the result depend on the processor's bf16 kernels.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from k5kernels.device import choose_device, device_of
from k5kernels.latents.video import to_model
from k5kernels.terminal import DeviceName, one_line_errors, one_line_stop
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.weights import load_decoder, load_encoder, save_vae
from model.nano import CLIP_FRAMES, RESOLUTION
from train.clips import NAMES, load_clip, split
from train.evaluation import psnr
from train.log import Log
from train.loop import LOG, Loop
from train.nano_settings import record
from train.only_training import only_training
from train.schedule import Schedule
from train.vae_stage import VAE, VAEStage

PROGRAM = "train.nano_vae"
NANO_VAE = VAEConfig(widths=(16, 32, 64, 48), groups=8, scaling_factor=1.0)
TRAINING_RESOLUTIONS = (256, 512)
WARMUP_STEPS = 20


@torch.inference_mode()
def scaling_factor(vae: VAE, clips: list[Tensor]) -> float:
    """What brings the latents of the clips' first frames to a standard deviation of one."""
    device = device_of(vae)
    videos = (to_model(clip[:CLIP_FRAMES]).to(device) for clip in clips)
    latents = torch.cat([vae.encoder.moments(video)[0].flatten() for video in videos])
    return round(float(1 / latents.std()), 4)


def export(vae: VAE, factor: float, path: Path) -> None:
    """Write the float16 weights that ship; their config carries the factor."""
    vae.encoder.config = vae.decoder.config = replace(NANO_VAE, scaling_factor=factor)
    save_vae(path, vae.encoder, vae.decoder, dtype=torch.float16)


def held_out_clips() -> dict[str, Tensor]:
    """The first held-out frames of every clip, ready for the encoder: [1, 3, CLIP_FRAMES, H, W]."""
    return {name: to_model(split(load_clip(name, RESOLUTION))[1][:CLIP_FRAMES]) for name in NAMES}


@torch.inference_mode()
def held_out_psnr(encoder: HunyuanEncoder, decoder: HunyuanDecoder, clips: dict[str, Tensor]) -> dict[str, float]:
    """PSNR [dB] in float32 of each clip's reconstruction."""

    def reconstruct(video: Tensor) -> Tensor:
        return decoder(encoder(video)).clamp(-1, 1)

    on_device = {name: video.to(device_of(encoder)) for name, video in clips.items()}
    return {name: round(psnr(reconstruct(video), video, peak=2.0), 2) for name, video in on_device.items()}


@one_line_errors(PROGRAM)
@one_line_stop(PROGRAM, lambda: "the same command goes on from the last checkpoint")
def main(
    out: Annotated[Path, typer.Option(help="folder for weights, checkpoints, figures and the log")],
    steps: Annotated[int, typer.Option(min=1, help="steps of the whole schedule")] = 1400,
    settings: Annotated[Path | None, typer.Option(help="JSON file that gets the figures; out/settings.json")] = None,
    seed: Annotated[int, typer.Option(help="of the random weights and of every draw")] = 0,
    every: Annotated[int, typer.Option(min=1, help="steps between log rows and checkpoints")] = 200,
    device: DeviceName = None,
) -> None:
    """Train, or go on from the folder's checkpoint; then write vae.safetensors and its figures."""
    chosen = choose_device(device)
    training = {f"{name} {side}": split(load_clip(name, side))[0] for name in NAMES for side in TRAINING_RESOLUTIONS}
    held_out = held_out_clips()
    torch.manual_seed(seed)
    stage = VAEStage(VAE(NANO_VAE).to(chosen), training, steps)
    averaged = deepcopy(stage.model)

    def measure(row: Mapping[str, Any]) -> dict[str, Any]:
        stage.average.copy_to(averaged)
        return {"psnr_db": held_out_psnr(averaged.encoder, averaged.decoder, held_out)}

    schedule = Schedule(steps, WARMUP_STEPS, decay_steps=steps // 2, max_grad_norm=None, seed=seed)
    weights = out / "vae.safetensors"
    with only_training(out):
        Loop(stage, schedule).run(out, every, measure)
        stage.average.copy_to(averaged)
        export(averaged, scaling_factor(averaged, list(training.values())[:: len(TRAINING_RESOLUTIONS)]), weights)
    seconds = round(Log(out / LOG).seconds())
    figures = {"script": "train/nano_vae.py", "seed": seed, "steps": steps, "seconds": seconds}
    reached = held_out_psnr(load_encoder(weights).to(chosen), load_decoder(weights).to(chosen), held_out)
    record(settings or out / "settings.json", {"vae": {**figures, "held_out_psnr_db": reached}})


if __name__ == "__main__":
    typer.run(main)
