"""The stage that trains CrossDiT on latents: flow matching, AdamW, EMA (§6.3.2)."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.latents.shards import LATENT_CHANNELS
from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from k5kernels.vae.config import SPATIAL_STRIDE
from model.crossdit import CrossDiT
from model.flow_matching import flow_matching_loss
from train.latents import LatentBatch, LatentSet, Resolution
from train.optimizer import adamw
from train.parallel import ALONE, Parallel
from train.stage import Loss, Stage

EncodeText = Callable[[list[str]], TextCondition]


@dataclass(frozen=True)
class FlowMatching:
    """Settings of the stage; the defaults that have a value in the report are the report's.

    latent_frames: keep the first so many of each sample (None: all); 1 trains on images.
    image_share: share of steps on images alone, image_batch of them (None: batch). Images are samples of one frame, or
    first frames where there are none; with a share above 0 the other steps are on clips of more than one frame.
    resolutions: (height, width) of a latent -> weight; others are not drawn. None: all, by their samples.
    weight_decay: of matrices; norms, biases and embeddings are left alone.
    unconditional: share of captions replaced by the empty prompt.
    image_to_video: share of the samples of a step on clips whose first latent frame is given.
    bf16: autocast to bfloat16; the result then depends on the processor's bf16 kernels in the last bits.
    """

    batch: int = 1
    latent_frames: int | None = None
    image_share: float = 0.0
    image_batch: int | None = None
    resolutions: tuple[tuple[Resolution, float], ...] | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    unconditional: float = 0.1
    image_to_video: float = 0.5
    scheduler_scale: float = 1.0
    attention: AttentionConfig = DENSE
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("unconditional", "image_to_video", "image_share", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        for name in ("batch", "image_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.latent_frames is not None and self.latent_frames < 1:
            raise ValueError(f"latent_frames: expected at least 1, or None for all, got {self.latent_frames}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")

    def batch_of(self, images: bool) -> int:
        """Samples of a step on images or on clips."""
        return self.image_batch or self.batch if images else self.batch


def crossdit_settings(config: FlowMatching, model: CrossDiTConfig, start: str | None) -> dict[str, Any]:
    """The settings of a CrossDiTStage but for its data: what can be known before anything is loaded."""
    return {"stage": "crossdit", **asdict(config), "model": asdict(model), "init": start}


def check_fits(data: LatentSet, model: CrossDiTConfig) -> None:
    """Raises ValueError where the model cannot take latents of the data's sizes."""
    if model.in_visual_dim != LATENT_CHANNELS:
        raise ValueError(f"model: expected {LATENT_CHANNELS} latent channels as in shards, got {model.in_visual_dim}")
    for grid, samples in data.grids.items():
        if any(side % patch for side, patch in zip(grid, model.patch_size, strict=True)):
            raise ValueError(
                f"latents: expected frames, height and width that are multiples of the patch {model.patch_size}, "
                f"got {grid} in {samples} samples; encode them at sides that are multiples of 16 pixels"
            )


def check_resolutions(data: LatentSet, config: FlowMatching) -> None:
    """Raises ValueError where the data lack a resolution that the stage trains on, or clips, where it asks for some."""
    for (height, width), _ in config.resolutions or ():
        if not any(grid[1:] == (height, width) for grid in data.grids):
            found = ", ".join(sorted({f"{H * SPATIAL_STRIDE}x{W * SPATIAL_STRIDE}" for _, H, W in data.grids}))
            raise ValueError(
                f"resolutions: expected latents of {height * SPATIAL_STRIDE}x{width * SPATIAL_STRIDE} pixels, found "
                f"{found}; encode some, or leave this one out of the stage"
            )
    if 0 < config.image_share < 1 and all(grid[0] == 1 for grid in data.grids):
        raise ValueError(
            f"image_share: expected latents of more than one frame for the other {1 - config.image_share:.0%} of the "
            "steps, found images alone; encode clips, or train on images alone (image_share 1)"
        )


@dataclass(frozen=True)
class Drawn:
    """batch: of all processes together. own: the samples of it that this one takes. text: of those. given: bool [B],
    the samples whose first latent frame is given."""

    batch: LatentBatch
    text: TextCondition
    given: Tensor
    own: slice


@dataclass
class Work:
    """What a stage has done: (samples, tokens of one) of every batch, and how long the data took."""

    batches: list[tuple[int, int]] = field(default_factory=list)
    data_seconds: float = 0.0


class CrossDiTStage(Stage):
    """Flow matching on batches of a LatentSet; all of the model's parameters learn.

    encode_text: gives its TextCondition on the device of the model. start: what the weights are at the first step, in
    words; None where the seed says it. parallel: the processes that share each batch, which is drawn whole on all of
    them: a step is the same however many they are.
    """

    model: CrossDiT

    def __init__(
        self,
        model: CrossDiT,
        data: LatentSet,
        encode_text: EncodeText,
        config: FlowMatching,
        start: str | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        check_fits(data, model.config)
        check_resolutions(data, config)
        self.data, self.encode_text, self.config = data, encode_text, config
        self.own = {images: parallel.own(config.batch_of(images)) for images in (False, True)}
        self._work = Work()
        optimizer = adamw(model, config.learning_rate, config.weight_decay)
        settings = crossdit_settings(config, model.config, start) | {"data": data.description}
        super().__init__(settings, model, {"adamw": optimizer}, config.ema_decay)

    def draw(self, generator: torch.Generator) -> Drawn:
        """A batch, some samples without their caption, some with their first frame given."""
        config = self.config
        images = self._on_images(generator)
        size, own = config.batch_of(images), self.own[images]
        batch = self.data.draw(
            generator,
            size,
            1 if images else config.latent_frames,
            images=images if config.image_share else None,
            resolutions=config.resolutions,
        )
        dropped = torch.rand(size, generator=generator) < config.unconditional
        captions = ["" if drop else text for drop, text in zip(dropped, batch.captions, strict=True)]
        given = torch.rand(size, generator=generator) < config.image_to_video
        if batch.latents.shape[1] == 1:
            given = torch.zeros_like(given)  # a single frame that is given leaves nothing to learn
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            return Drawn(batch, self.encode_text(captions[own]), given, own)

    def loss(self, step: int, generator: torch.Generator) -> Loss:
        """The loss of the batch that the step draws."""
        config, began = self.config, time.perf_counter()
        drawn = self.draw(generator)
        self._work.data_seconds += time.perf_counter() - began
        self._work.batches.append((len(drawn.batch.captions), drawn.batch.tokens))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            loss = flow_matching_loss(
                self.model,
                drawn.batch.latents,
                drawn.text,
                generator,
                first_frame=drawn.given,
                scheduler_scale=config.scheduler_scale,
                attention=config.attention,
                own=drawn.own,
            )
        return Loss(loss, drawn.batch.samples)

    def _on_images(self, generator: torch.Generator) -> bool:
        """Whether a step is on images alone."""
        share = self.config.image_share
        return share == 1 or (share > 0 and bool(torch.rand(1, generator=generator) < share))

    def take_work(self) -> Work:
        """What was done since this was last asked."""
        work, self._work = self._work, Work()
        return work
