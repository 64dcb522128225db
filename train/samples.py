"""What a model makes of a caption while it trains: a strip of frames at each of a few milestones."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from k5kernels.latents.video import to_frames
from k5kernels.vae import HunyuanDecoder
from model.sampler import sample
from train.crossdit_stage import CrossDiTStage
from train.pictures import write_picture

FOLDER = "samples"
STEPS, GUIDANCE, SEED = 20, 2.0, 0
SHOWN = 6  # frames of a strip, at most


class Samples:
    """A clip sampled from the caption and at the size of one of the data's, with the weights as they are then.

    decoder: of the VAE whose latents the data are; None on all processes but the first. milestones: how many, evenly
    over the schedule's `steps`; each is drawn with the first row of the log at or after it, one of which comes every
    `every` steps. Sampling draws from a generator of its own and changes no weight: training goes on as without it.
    """

    def __init__(
        self,
        stage: CrossDiTStage,
        decoder: HunyuanDecoder | None,
        out: Path,
        *,
        steps: int,
        every: int,
        milestones: int,
    ) -> None:
        self._stage, self._decoder = stage, decoder
        self._folder = out / FOLDER
        self._steps, self._every, self._milestones = steps, every, milestones
        config = stage.config
        only_images = config.image_share == 1
        clip = stage.data.draw(
            torch.Generator().manual_seed(SEED),
            1,
            1 if only_images else config.latent_frames,
            images=only_images if config.image_share else None,
            resolutions=config.resolutions,
        )
        self._clip, (self._caption,) = clip.latents, clip.captions

    def __call__(self, done: int) -> Path | None:
        """The strip that was drawn, where the row after so many steps is that of a milestone; on every process."""
        before = (done - 1) // self._every * self._every
        if done * self._milestones // self._steps == before * self._milestones // self._steps:
            return None
        latent = self._sample()
        if self._decoder is None:
            return None
        with torch.no_grad():
            frames = to_frames(self._decoder(latent.permute(0, 4, 1, 2, 3))).cpu()
        path = self._folder / f"step-{done:06d}.png"
        self._folder.mkdir(parents=True, exist_ok=True)
        write_picture(strip(frames), path)
        return path

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """[1, T, H, W, 16], the same on all processes, which all take part: weights and sequence are shared."""
        stage, config = self._stage, self._stage.config
        B, T, H, W, C = self._clip.shape
        given = self._clip[:, :1] if config.image_to_video == 1 and T > 1 else None
        with torch.autocast(stage.device.type, torch.bfloat16, enabled=config.bf16):
            latent = sample(
                stage.model,
                stage.encode_text([self._caption]),
                stage.encode_text([""]),
                (B, T, H, W, C),
                first_frame=given,
                steps=STEPS,
                guidance=GUIDANCE if config.unconditional else 1.0,
                scheduler_scale=config.scheduler_scale,
                seed=SEED,
                attention=config.attention,
            )
        if isinstance(stage.model, FSDPModule):  # without a backward its root's weights stay gathered
            stage.model.reshard()
        return latent


def strip(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] → [H, columns · W, 3]: frames at even distances, the first and the last among them."""
    count = min(SHOWN, frames.shape[0])
    chosen = torch.linspace(0, frames.shape[0] - 1, count).round().long()
    return torch.cat(list(frames[chosen]), dim=1)


def strips(out: Path) -> dict[int, Path]:
    """Of a run's folder: step -> the strip that was drawn there, in order."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted((out / FOLDER).glob("step-*.png"))}
