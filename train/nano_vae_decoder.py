"""Trains the nano VAE's decoder on whole frames; the encoder, and with it every latent, stays as it is.

    python -m train.nano_vae_decoder --vae runs/nano_vae/vae.safetensors --out runs/nano_vae_decoder --steps 90

The learning rate falls to zero over all steps. Training runs under bf16 autocast, so the last bits of the result depend
on the processor's bf16 kernels.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from k5kernels.device import choose_device
from k5kernels.terminal import DeviceName, one_line_errors, one_line_stop
from k5kernels.vae.weights import load_decoder, load_encoder, save_vae
from model.nano import RESOLUTION
from train.clips import NAMES, load_clip, split
from train.decoder_stage import DecoderStage
from train.log import Log
from train.loop import LOG, Loop
from train.nano_settings import record
from train.nano_vae import held_out_clips, held_out_psnr
from train.only_training import only_training
from train.schedule import Schedule

PROGRAM = "train.nano_vae_decoder"
WARMUP_STEPS = 10


@one_line_errors(PROGRAM)
@one_line_stop(PROGRAM, lambda: "the same command goes on from the last checkpoint")
def main(
    vae: Annotated[Path, typer.Option(help="weights of train.nano_vae: the decoder starts from them")],
    out: Annotated[Path, typer.Option(help="folder for weights, checkpoints, figures and the log")],
    steps: Annotated[int, typer.Option(min=1, help="steps of the whole schedule")] = 90,
    settings: Annotated[Path | None, typer.Option(help="JSON file that gets the figures; out/settings.json")] = None,
    seed: Annotated[int, typer.Option(help="of every draw")] = 0,
    every: Annotated[int, typer.Option(min=1, help="steps between log rows and checkpoints")] = 10,
    device: DeviceName = None,
) -> None:
    """Train, or go on from the folder's checkpoint; then write vae.safetensors and the figures of both halves."""
    chosen = choose_device(device)
    encoder = load_encoder(vae).to(chosen).requires_grad_(False)
    training = {name: split(load_clip(name, RESOLUTION))[0] for name in NAMES}
    held_out = held_out_clips()
    stage = DecoderStage(encoder, load_decoder(vae).to(chosen), training)
    averaged = deepcopy(stage.model)

    def measure(row: Mapping[str, Any]) -> dict[str, Any]:
        stage.average.copy_to(averaged)
        return {"psnr_db": held_out_psnr(encoder, averaged, held_out)}

    weights = out / "vae.safetensors"
    with only_training(out):
        Loop(stage, Schedule(steps, WARMUP_STEPS, decay_steps=steps, max_grad_norm=None, seed=seed)).run(
            out, every, measure
        )
        stage.average.copy_to(averaged)
        save_vae(weights, encoder, averaged, dtype=torch.float16)
    seconds = round(Log(out / LOG).seconds())
    figures = {"script": "train/nano_vae_decoder.py", "seed": seed, "steps": steps, "seconds": seconds}
    reached = held_out_psnr(load_encoder(weights).to(chosen), load_decoder(weights).to(chosen), held_out)
    record(settings or out / "settings.json", {"vae": {"decoder": figures, "held_out_psnr_db": reached}})


if __name__ == "__main__":
    typer.run(main)
