"""From noise to a latent: Euler steps along the velocity, with classifier-free guidance (§6.3)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.profiling import stage
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from model.flow_matching import TIME_UNITS, check_first_frame, check_takes_condition, condition_input, shift_time
from model.latent_tokens import latent_velocity


class Cache(Protocol):
    """MagCache or MagCalibration: told of every run, asked for one callable a branch."""

    def reset(self, steps: int | None = None) -> None: ...

    def branch(self, name: str) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]: ...


def time_grid(steps: int, scheduler_scale: float | None = None) -> Tensor:
    """steps + 1 times from 1 (noise) to 0 (latent), float32, evenly spaced and then shifted by scheduler_scale."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), scheduler_scale).float()


@dataclass(frozen=True)
class SamplingStep:
    """One Euler step: next_latent = latent + (next_time - time) * velocity, where a given first frame is put back.

    index: from 0. time, next_time: from 1 (noise) to 0. latent, velocity, next_latent: [B, T, H, W, C], float32;
    the velocity is the guided one.
    """

    index: int
    time: float
    next_time: float
    latent: Tensor
    velocity: Tensor
    next_latent: Tensor


def sampling_steps(
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
) -> Iterator[SamplingStep]:
    """The steps of one sampling run, each computed when it is asked for.

    text: in the dtype the model computes in; its input is cast to it. negative: what guidance leads away from; not
    used, and may be None, when guidance is 1, where each step costs one pass of the model instead of two.
    shape: (B, T, H, W, C) of the latent. first_frame: [B, 1, H, W, C], image to video: kept exactly. seed: the noise
    is drawn on the CPU, so it is the same on every device, and moved to the device of the text. cache: reset to this
    run first, then given each pass as branch "cond" or "uncond".

    A step has a graph where it is asked for with gradients enabled: training through the last steps of a run takes the
    others under torch.no_grad(). Raises ValueError, before the first step, where an argument does not fit.
    """
    _check(model, text, negative, shape, first_frame, guidance)
    times = time_grid(steps, scheduler_scale).tolist()
    device = text.tokens.device
    if first_frame is not None:
        first_frame = first_frame.to(device, torch.float32)

    def velocity(x: Tensor, condition: TextCondition, branch: str, time: float) -> Tensor:
        channels = condition_input(x, first_frame) if model.config.visual_cond else x
        run = None if cache is None else cache.branch(branch)
        return latent_velocity(
            model,
            channels.to(text.tokens.dtype),
            torch.full(shape[:1], time * TIME_UNITS, device=device),
            condition,
            rope_scale=rope_scale,
            attention=attention,
            cache=run,
        ).float()

    def guided_velocity(x: Tensor, time: float) -> Tensor:
        towards = velocity(x, text, "cond", time)
        if guidance == 1 or negative is None:
            return towards
        away = velocity(x, negative, "uncond", time)
        return away + guidance * (towards - away)

    def run() -> Iterator[SamplingStep]:
        latent = _start(shape, first_frame, seed, device)
        if cache is not None:
            cache.reset(steps)
        for index, (time, next_time) in enumerate(pairwise(times)):
            with stage("sampling step"):
                towards = guided_velocity(latent, time)
            next_latent = latent + (next_time - time) * towards
            if first_frame is not None:
                next_latent[:, :1] = first_frame
            yield SamplingStep(index, time, next_time, latent, towards, next_latent)
            latent = next_latent

    return run()


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
    """A latent [B, T, H, W, C] = shape, float32, on the device of the text: where the last of `sampling_steps` ends.

    Arguments and errors as there. progress: called with (steps done, steps) after each step. The same arguments give
    the same latent.
    """
    run = sampling_steps(
        model,
        text,
        negative,
        shape,
        first_frame=first_frame,
        steps=steps,
        guidance=guidance,
        scheduler_scale=scheduler_scale,
        seed=seed,
        rope_scale=rope_scale,
        attention=attention,
        cache=cache,
    )
    for step in run:
        if progress is not None:
            progress(step.index + 1, steps)
    return step.next_latent


def _start(shape: tuple[int, ...], first_frame: Tensor | None, seed: int, device: torch.device) -> Tensor:
    """Noise, with the first frame in its place."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    if first_frame is not None:
        noise[:, :1] = first_frame
    return noise


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
