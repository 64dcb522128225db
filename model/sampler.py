"""From noise to a latent: Euler steps along the velocity, with classifier-free guidance (§6.3)."""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from k5kernels.attention import DENSE, AttentionConfig
from model.conditioning import TextCondition
from model.crossdit import CrossDiT
from model.flow_matching import TIME_UNITS, check_first_frame, check_takes_condition, condition_input, shift_time

Velocity = Callable[[TextCondition, str, float], Tensor]  # of a condition, its branch and the time


class Cache(Protocol):
    """MagCache or MagCalibration: told of every run, asked for one callable a branch."""

    def reset(self, steps: int | None = None) -> None: ...

    def branch(self, name: str) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]: ...


def time_grid(steps: int, scheduler_scale: float | None = None) -> Tensor:
    """steps + 1 times from 1 (noise) to 0 (latent), float32, evenly spaced and then shifted by scheduler_scale."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), scheduler_scale).float()


@torch.no_grad()
def sample(
    model: CrossDiT,
    text: TextCondition,
    negative: TextCondition | None,
    shape: tuple[int, int, int, int, int],
    *,
    first_frame: Tensor | None = None,
    steps: int = 50,
    guidance: float = 5.0,
    scheduler_scale: float | None = None,
    seed: int = 0,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    attention: AttentionConfig = DENSE,
    cache: Cache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """A latent [B, T, H, W, C] = shape, float32, on the device of the text.

    model: CrossDiT. text: in the dtype the model computes in; its input is cast to it. negative: what guidance leads
    away from; not used, and may be None, when guidance is 1, where each step costs one pass instead of two.
    first_frame: [B, 1, H, W, C], image to video: kept exactly. seed: the noise is drawn on the CPU, so it is the same
    on every device. cache: reset to this run first, then given each pass as branch "cond" or "uncond".
    progress: called with (steps done, steps) after each step.

    The same arguments give the same latent. Raises ValueError where an argument does not fit.
    """
    _check(model, text, negative, shape, first_frame, guidance)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(text.tokens.device)
    if first_frame is not None:
        first_frame = first_frame.to(x)
        x[:, :1] = first_frame
    if cache is not None:
        cache.reset(steps)

    def velocity(condition: TextCondition, branch: str, time: float) -> Tensor:
        channels = condition_input(x, first_frame) if model.config.visual_cond else x
        times = torch.full(shape[:1], time * TIME_UNITS, device=x.device)
        run = None if cache is None else cache.branch(branch)
        channels = channels.to(text.tokens.dtype)
        return model(channels, times, condition, rope_scale=rope_scale, attention=attention, cache=run).float()

    for step, (time, following) in enumerate(pairwise(time_grid(steps, scheduler_scale).tolist())):
        x = x + (following - time) * _guided(velocity, text, negative, guidance, time)
        if first_frame is not None:
            x[:, :1] = first_frame
        if progress is not None:
            progress(step + 1, steps)
    return x


def _guided(
    velocity: Velocity, text: TextCondition, negative: TextCondition | None, guidance: float, time: float
) -> Tensor:
    """The velocity towards the text, led away from the negative one."""
    towards = velocity(text, "cond", time)
    if guidance == 1 or negative is None:
        return towards
    away = velocity(negative, "uncond", time)
    return away + guidance * (towards - away)


def _check(
    model: CrossDiT,
    text: TextCondition,
    negative: TextCondition | None,
    shape: tuple[int, ...],
    first_frame: Tensor | None,
    guidance: float,
) -> None:
    if len(shape) != 5 or shape[0] != text.tokens.shape[0]:
        raise ValueError(f"shape: expected (B, T, H, W, C) with B = {text.tokens.shape[0]} as the text, got {shape}")
    if guidance != 1 and negative is None:
        raise ValueError(f"negative: expected a TextCondition for guidance {guidance}, got None; or set guidance=1")
    if first_frame is not None:
        check_takes_condition(model)
        check_first_frame(first_frame, shape)
