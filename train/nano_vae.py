"""Trains the nano VAE: HunyuanVideo's architecture at small widths, on three short clips.

    python -m train.nano_vae --out runs/nano_vae --steps 1400

Every step draws its crop from a generator seeded by (seed, step), so a resumed run sees what an
uninterrupted one would. The learning rate is constant over the first half, then falls to zero.
bf16 autocast makes the result depend on the processor's bf16 kernels in the last bits.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor, nn

from k5kernels.latents.video import to_model
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.layers import FrameCausalAttention, ResnetBlock
from k5kernels.vae.weights import load_decoder, load_encoder, save_vae
from model.nano import CLIP_FRAMES, RESOLUTION
from train.checkpoint import load_checkpoint, save_checkpoint
from train.clips import NAMES, load_clip, split
from train.evaluation import psnr
from train.muon import ConvMuon
from train.nano_settings import record
from train.schedule import learning_rate

NANO_VAE = VAEConfig(widths=(16, 32, 64, 48), groups=8, scaling_factor=1.0)
MUON_LEARNING_RATE = 5e-3  # of filters and matrices
ADAM_LEARNING_RATE = 2e-3  # of biases and norms
WARMUP_STEPS = 20
EMA_DECAY = 0.99
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.2
INITIAL_LOG_VARIANCE = -6.0
# Single frames teach space at the most updates for the time, short videos then teach time, large crops at the end
# set the GroupNorm statistics of whole frames. Each is (batch, frames, side) and how often it is drawn.
IMAGE_CROPS = ((8, 1, 64, 0.9), (2, 1, 128, 0.1))
VIDEO_CROPS = ((4, 1, 96, 0.2), (1, 5, 96, 0.5), (1, 9, 96, 0.3))
LARGE_CROPS = ((2, 1, 256, 0.2), (1, 9, 128, 0.4), (1, 17, 128, 0.2), (1, 9, 192, 0.2))
IMAGE_SHARE, VIDEO_SHARE = 0.45, 0.40
Crops = tuple[tuple[int, int, int, float], ...]


class VAE(nn.Module):
    """Encoder and decoder trained together."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = HunyuanEncoder(config)
        self.decoder = HunyuanDecoder(config)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Start as a linear autoencoder of single frames: residual branches add nothing, the latent has little noise.

        Filters see the present only. With past frames in them from the start, each of the many causal layers would
        delay the video, and single frames, where past and present are the same, could not teach otherwise.
        """
        for convolution in self.convolutions():
            nn.init.kaiming_normal_(convolution.weight[:, :, -1], nonlinearity="linear")
            nn.init.zeros_(convolution.weight[:, :, :-1])
            nn.init.zeros_(convolution.get_parameter("bias"))
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.conv.weight)
            elif isinstance(module, FrameCausalAttention):
                nn.init.zeros_(module.to_out.get_parameter("0.weight"))
        self.encoder.quant_conv.get_parameter("bias")[NANO_VAE.latent_channels :] = INITIAL_LOG_VARIANCE

    def convolutions(self) -> list[nn.Conv3d]:
        """All convolutions; filters are [out, in, time, height, width], the present last in time."""
        return [module for module in self.modules() if isinstance(module, nn.Conv3d)]

    def loss(self, video: Tensor, noise: torch.Generator) -> Tensor:
        """MSE + L1 of the reconstruction of a sampled latent, plus a small KL term."""
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = (t.float() for t in self.encoder.moments(video))
            latent = mean + torch.randn(mean.shape, generator=noise) * torch.exp(0.5 * log_variance)
            output = self.decoder(latent).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return F.mse_loss(output, video) + L1_WEIGHT * F.l1_loss(output, video) + KL_WEIGHT * kl


def crops_at(step: int, steps: int) -> Crops:
    """Images, then short videos, then large crops."""
    if step < IMAGE_SHARE * steps:
        return IMAGE_CROPS
    return VIDEO_CROPS if step < (IMAGE_SHARE + VIDEO_SHARE) * steps else LARGE_CROPS


def draw_crops(clips: list[Tensor], crops: Crops, generator: torch.Generator) -> Tensor:
    """Random crops of random clips (weighted by length), some mirrored: [batch, 3, F, side, side]."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    weights = torch.tensor([float(clip.shape[0]) for clip in clips])
    shape = torch.multinomial(torch.tensor([crop[-1] for crop in crops]), 1, generator=generator)
    batch, frames, side, _ = crops[int(shape)]
    videos = []
    for index in torch.multinomial(weights, batch, replacement=True, generator=generator):
        clip = clips[int(index)]
        start, top, left = (below(clip.shape[i] - size + 1) for i, size in enumerate((frames, side, side)))
        video = to_model(clip[start : start + frames, top : top + side, left : left + side])
        videos.append(video.flip(-1) if below(2) else video)
    return torch.cat(videos)


class VAETrainer:
    """The VAE, its running average and the two optimizers; `step` does one update."""

    def __init__(self, clips: list[Tensor], steps: int, seed: int) -> None:
        """clips: uint8 [F, H, W, 3] each, training frames only."""
        self.clips, self.steps, self.seed = clips, steps, seed
        torch.manual_seed(seed)
        self.vae, self.ema = VAE(NANO_VAE), VAE(NANO_VAE)
        self.ema.load_state_dict(self.vae.state_dict())
        filters = [p for p in self.vae.parameters() if p.ndim > 1]
        others = [p for p in self.vae.parameters() if p.ndim == 1]
        self.muon = ConvMuon(filters, lr=0.0)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self.done, self.seconds = 0, 0.0

    def step(self) -> float:
        """One update; the loss before it."""
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        crops = draw_crops(self.clips, crops_at(self.done, self.steps), generator)
        loss = self.vae.loss(crops, generator)
        self.vae.zero_grad()
        loss.backward()
        if self.done < IMAGE_SHARE * self.steps:
            for convolution in self.vae.convolutions():
                assert convolution.weight.grad is not None
                convolution.weight.grad[:, :, :-1] = 0
        schedule = learning_rate(self.done, self.steps, 1.0, WARMUP_STEPS, self.steps // 2)
        self.muon.param_groups[0]["lr"] = MUON_LEARNING_RATE * schedule
        self.adam.param_groups[0]["lr"] = ADAM_LEARNING_RATE * schedule
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (self.done + 1) / (self.done + 10))
            for average, parameter in zip(self.ema.parameters(), self.vae.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        self.done += 1
        self.seconds += time.perf_counter() - began
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Everything a resumed run needs."""
        parts = {name: getattr(self, name).state_dict() for name in ("vae", "ema", "muon", "adam")}
        save_checkpoint(parts | {"step": self.done, "seconds": self.seconds}, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint where there is one."""
        if state := load_checkpoint(path):
            for name in ("vae", "ema", "muon", "adam"):
                getattr(self, name).load_state_dict(state[name])
            self.done, self.seconds = state["step"], state["seconds"]


@torch.inference_mode()
def scaling_factor(vae: VAE, clips: list[Tensor]) -> float:
    """What brings the latents of the clips' first frames to a standard deviation of one."""
    latents = torch.cat([vae.encoder.moments(to_model(clip[:CLIP_FRAMES]))[0].flatten() for clip in clips])
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

    return {name: round(psnr(reconstruct(video), video, peak=2.0), 2) for name, video in clips.items()}


def main(
    out: Annotated[Path, typer.Option(help="folder for weights, checkpoints, figures and the log")],
    steps: Annotated[int, typer.Option(help="steps of the whole schedule")] = 1400,
    settings: Annotated[Path | None, typer.Option(help="JSON file that gets the figures; out/settings.json")] = None,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="steps between log rows and checkpoints")] = 200,
) -> None:
    """Train, or go on from the folder's checkpoint; then write vae.safetensors and its figures."""
    out.mkdir(parents=True, exist_ok=True)
    training = [split(load_clip(name, resolution))[0] for name in NAMES for resolution in (256, 512)]
    held_out = held_out_clips()
    trainer = VAETrainer(training, steps, seed)
    trainer.resume(out / "checkpoint.pt")
    for _ in track(range(trainer.done, steps), description="nano VAE"):
        loss = trainer.step()
        if trainer.done % every == 0 or trainer.done == steps:
            row: dict[str, Any] = {"step": trainer.done, "seconds": round(trainer.seconds), "loss": round(loss, 4)}
            row |= {"psnr_db": held_out_psnr(trainer.ema.encoder, trainer.ema.decoder, held_out)}
            with (out / "log.jsonl").open("a") as log:
                print(json.dumps(row), file=log)
            trainer.save(out / "checkpoint.pt")
    weights = out / "vae.safetensors"
    export(trainer.ema, scaling_factor(trainer.ema, training[::2]), weights)
    figures: dict[str, Any] = {
        "script": "train/nano_vae.py",
        "seed": seed,
        "steps": steps,
        "seconds": round(trainer.seconds),
    }
    reached = held_out_psnr(load_encoder(weights), load_decoder(weights), held_out)
    record(settings or out / "settings.json", {"vae": figures | {"held_out_psnr_db": reached}})


if __name__ == "__main__":
    typer.run(main)
