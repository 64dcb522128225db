"""The training loop of CrossDiT in one process (§6.3.2): flow matching, AdamW, EMA."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from k5kernels.attention import DENSE, AttentionConfig
from model.conditioning import TextCondition
from model.crossdit import CrossDiT
from model.flow_matching import flow_matching_loss
from train.checkpoint import load_checkpoint, save_checkpoint
from train.latents import LatentSet
from train.schedule import learning_rate

EncodeText = Callable[[list[str]], TextCondition]


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training; the defaults that have a value in the report are the report's.

    latent_frames: keep the first so many of each sample (None: all); 1 trains on images.
    image_to_video: share of samples whose first latent frame is given.
    unconditional: share of captions replaced by the empty prompt.
    bf16: autocast to bfloat16; the result then depends on the processor's bf16 kernels in the last bits.
    """

    steps: int
    batch: int = 1
    latent_frames: int | None = None
    peak_learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.0
    grad_norm: float = 1.0
    ema_decay: float = 0.9999
    unconditional: float = 0.1
    image_to_video: float = 0.5
    scheduler_scale: float = 1.0
    attention: AttentionConfig = DENSE
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("unconditional", "image_to_video", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class Trainer:
    """Holds the model, its running average and the optimizer; `step` does one update.

    Every step draws from a generator seeded by (seed, step), so a resumed run sees the batches and the noise
    that an uninterrupted one would.
    """

    def __init__(self, model: CrossDiT, data: LatentSet, encode_text: EncodeText, config: TrainConfig) -> None:
        self.model, self.data, self.encode_text, self.config = model, data, encode_text, config
        self.ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=config.weight_decay
        )
        self.done = 0

    def step(self) -> float:
        """One update; the loss before it."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.done)
        batch = self.data.draw(generator, config.batch, config.latent_frames)
        dropped = torch.rand(config.batch, generator=generator) < config.unconditional
        captions = ["" if drop else text for drop, text in zip(dropped, batch.captions, strict=True)]
        given = torch.rand(config.batch, generator=generator) < config.image_to_video
        if batch.latents.shape[1] == 1:
            given = torch.zeros_like(given)  # a single frame that is given leaves nothing to learn
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = flow_matching_loss(
                self.model,
                batch.latents,
                self.encode_text(captions),
                generator,
                first_frame=given,
                scheduler_scale=config.scheduler_scale,
                attention=config.attention,
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate(
            self.done, config.steps, config.peak_learning_rate, config.warmup_steps, config.decay_steps
        )
        self.optimizer.step()
        self._average()
        self.done += 1
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        """EMA; short runs average less, so that the start does not outlast its weight."""
        decay = min(self.config.ema_decay, (self.done + 1) / (self.done + 10))
        for name, parameter in self.model.named_parameters():
            self.ema[name].lerp_(parameter, 1 - decay)

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs; the former file stays until the new one is whole."""
        state = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}
        save_checkpoint(state | {"done": self.done}, path)

    def resume(self, path: Path) -> bool:
        """Go on from a checkpoint; False where there is none."""
        state = load_checkpoint(path)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.done = state["ema"], state["done"]
        return True
