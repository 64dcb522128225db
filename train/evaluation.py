"""Judging a model: its loss on fixed noise, and samples whose time, density and picture are measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from k5kernels.attention import AttentionConfig, record_block_masks
from k5kernels.block_mask import BlockMask
from k5kernels.cache import MagCache, MagCalibration
from k5kernels.device import device_of, synchronize
from k5kernels.latents.video import to_frames
from k5kernels.text_condition import TextCondition
from k5kernels.vae import HunyuanDecoder
from model.crossdit import CrossDiT
from model.flow_matching import flow_matching_loss
from model.nano import NanoSettings
from model.sampler import sample
from train.crossdit_stage import EncodeText
from train.latents import LatentSet

Progress = Callable[[int, int], None]
PROBES = 8


@torch.no_grad()
def probe_loss(model: CrossDiT, data: LatentSet, encode_text: EncodeText, attention: AttentionConfig) -> float:
    """Mean loss over fixed samples, noises and times, half of them image to video."""
    losses = []
    device = device_of(model)
    for probe in range(PROBES):
        generator = torch.Generator().manual_seed(probe)
        batch = data.draw(generator, 1)
        given = torch.tensor([probe % 2 == 1])
        text = encode_text(batch.captions)
        losses.append(flow_matching_loss(model, batch.latents.to(device), text, generator, given, attention=attention))
    return float(torch.stack(losses).mean())


@dataclass(frozen=True)
class Scene:
    """What a sample starts from: the clip's latent [1, T, H, W, 16], whose first frame is given, and the text."""

    latent: Tensor
    text: TextCondition
    negative: TextCondition


@dataclass(frozen=True)
class Generation:
    """One sampled clip: frames uint8 [F, H, W, 3] on the CPU, how long its latent took, what its attention read.

    density: mean over all block masks, 1 for full attention. passes: model calls, two a step under guidance.
    last_masks: those of the last call that ran the blocks, by block.
    """

    frames: Tensor
    seconds: float
    density: float
    passes: int
    last_masks: list[BlockMask]


@torch.no_grad()
def generate(
    model: CrossDiT,
    decoder: HunyuanDecoder,
    scene: Scene,
    nano: NanoSettings,
    attention: AttentionConfig,
    cache: MagCache | MagCalibration | None = None,
    *,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> Generation:
    """Sample a clip from the scene's first frame and decode it; only the sampling is timed."""
    masks: list[BlockMask] = []
    kept, seen = 0.0, 0

    def watch(mask: BlockMask) -> None:
        nonlocal kept, seen
        kept, seen = kept + mask.density, seen + 1
        masks.append(mask)
        del masks[: -model.config.visual_blocks]

    B, T, H, W, C = scene.latent.shape
    began = time.perf_counter()
    with record_block_masks(watch):
        result = sample(
            model,
            scene.text,
            scene.negative,
            (B, T, H, W, C),
            first_frame=scene.latent[:, :1],
            steps=steps,
            guidance=nano.guidance,
            scheduler_scale=nano.scheduler_scale,
            seed=seed,
            attention=attention,
            cache=cache,
            progress=progress,
        )
    synchronize(result.device)
    seconds = time.perf_counter() - began
    video = decoder(result.permute(0, 4, 1, 2, 3))
    passes = steps if nano.guidance == 1 else 2 * steps
    return Generation(to_frames(video).cpu(), seconds, kept / seen if seen else 1.0, passes, masks)


def psnr(video: Tensor, reference: Tensor, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio [dB]; infinite where they are equal. peak: range of the values (255: of uint8)."""
    return float(10 * torch.log10(peak**2 / F.mse_loss(video.float(), reference.float())))
