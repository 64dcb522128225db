"""Trains the nano VAE: HunyuanVideo's architecture at small widths, on three short clips.

    python -m train.nano_vae --out runs/nano_vae --steps 3000

Every step draws its crop from a generator seeded by (seed, step), so a resumed run sees what an
uninterrupted one would. The learning rate is constant over the first half, then falls to zero.
bf16 autocast makes the result depend on the processor's bf16 kernels in the last bits.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor, nn

from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.layers import FrameCausalAttention, ResnetBlock
from k5kernels.vae.weights import save_vae
from k5kernels.video import to_model
from train.checkpoint import load_checkpoint, save_checkpoint
from train.clips import NAMES, load_clip, split
from train.muon import ConvMuon
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
        """Start as a linear autoencoder: residual branches add nothing yet, the latent carries little noise."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.conv.weight)
            elif isinstance(module, FrameCausalAttention):
                nn.init.zeros_(module.to_out[0].weight)
        self.encoder.quant_conv.bias[NANO_VAE.latent_channels :] = INITIAL_LOG_VARIANCE

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


@torch.no_grad()
def scaling_factor(encoder: HunyuanEncoder, clips: list[Tensor]) -> float:
    """What brings the latents of the clips' first 17 frames to a standard deviation of one."""
    latents = torch.cat([encoder.moments(to_model(clip[:17]))[0].flatten() for clip in clips])
    return round(float(1 / latents.std()), 4)


def export(vae: VAE, factor: float, path: Path) -> None:
    """Write the float16 weights that ship; VAEConfig carries the factor."""
    vae.encoder.config = vae.decoder.config = replace(NANO_VAE, scaling_factor=factor)
    save_vae(path, vae.encoder, vae.decoder, dtype=torch.float16)


@torch.no_grad()
def held_out_psnr(vae: VAE, clips: dict[str, Tensor]) -> dict[str, float]:
    """PSNR [dB] in float32 of each clip's held-out frames: 17 at a time, whole frames."""
    result = {}
    for name, frames in clips.items():
        video = to_model(frames[:17])
        output = vae.decoder(vae.encoder(video)).clamp(-1, 1)
        result[name] = round(float(10 * torch.log10(4 / F.mse_loss(output, video))), 2)
    return result


def main(
    out: Annotated[Path, typer.Option(help="folder for checkpoints and the log")],
    steps: Annotated[int, typer.Option(help="steps of the whole schedule")] = 2400,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="steps between checkpoints")] = 250,
) -> None:
    """Train, or go on from the folder's checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    clips = {(name, resolution): split(load_clip(name, resolution)) for name in NAMES for resolution in (256, 512)}
    training = [frames for frames, _ in clips.values()]
    held_out = {name: clips[name, 256][1] for name in NAMES}
    torch.manual_seed(seed)
    vae, ema = VAE(NANO_VAE), VAE(NANO_VAE)
    ema.load_state_dict(vae.state_dict())
    muon = ConvMuon([p for p in vae.parameters() if p.ndim > 1], lr=0.0)
    adam = torch.optim.AdamW([p for p in vae.parameters() if p.ndim == 1], betas=(0.9, 0.95), weight_decay=0.0)
    first, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if state := load_checkpoint(checkpoint):
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        first, seconds = state["step"], state["seconds"]
    began = time.perf_counter() - seconds
    for step in track(range(first, steps), description="nano VAE"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        schedule = learning_rate(step, steps, 1.0, WARMUP_STEPS, steps // 2)
        muon.param_groups[0]["lr"] = MUON_LEARNING_RATE * schedule
        adam.param_groups[0]["lr"] = ADAM_LEARNING_RATE * schedule
        crops = crops_at(step, steps)
        loss = vae.loss(draw_crops(training, crops, generator), generator)
        vae.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), vae.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            row = {"step": step + 1, "seconds": round(seconds), "loss": round(float(loss.detach()), 4)}
            row |= {"psnr_db": held_out_psnr(ema, held_out)}
            with (out / "log.jsonl").open("a") as log:
                print(json.dumps(row), file=log)
            state = {
                "vae": vae.state_dict(),
                "ema": ema.state_dict(),
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
            }
            save_checkpoint(state | {"step": step + 1, "seconds": seconds}, checkpoint)
    export(ema, scaling_factor(ema.encoder, [clips[name, 256][0] for name in NAMES]), out / "vae.safetensors")


if __name__ == "__main__":
    typer.run(main)
