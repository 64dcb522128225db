"""Flow matching: the straight path from latent to noise, and the loss of its velocity (§6.3).

    x_t = (1 - t) * x_0 + t * noise          target velocity = noise - x_0          t in [0, 1]

Latents are channels last, [B, T, H, W, C], as CrossDiT takes them. The model is given t * 1000.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from model.latent_tokens import latent_velocity

TIME_UNITS = 1000.0
EVERY = slice(None)


def noisy_latent(latent: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t of every sample: latent and noise [B, T, H, W, C], time [B] in 0..1."""
    t = time.to(latent.dtype).view(-1, *[1] * (latent.ndim - 1))
    return (1 - t) * latent + t * noise


def shift_time(time: Tensor, scheduler_scale: float | None) -> Tensor:
    """scale * t / (1 + (scale - 1) * t): a scale above 1 spends more of the path near the noise; None leaves t."""
    if scheduler_scale is None:
        return time
    if scheduler_scale <= 0:
        raise ValueError(f"scheduler_scale: expected a positive number or None, got {scheduler_scale}")
    return scheduler_scale * time / (1 + (scheduler_scale - 1) * time)


def condition_input(noisy: Tensor, first_frame: Tensor | None = None) -> Tensor:
    """The 2C + 1 input channels of a model that takes a condition: noisy latent, condition latent, mask (§6.3.1).

    noisy: [B, T, H, W, C]. Without first_frame (text to video) condition and mask are zero. With first_frame
    [B, 1, H, W, C] (image to video) it stands un-noised in place of noisy's first frame, and the mask is one there;
    the condition channels stay zero, as the released pipelines leave them.

    Returns [B, T, H, W, 2C + 1], dtype of noisy. Raises ValueError where first_frame does not fit.
    """
    condition = torch.zeros_like(noisy)
    mask = torch.zeros_like(noisy[..., :1])
    if first_frame is not None:
        check_first_frame(first_frame, noisy.shape)
        noisy = torch.cat([first_frame.to(noisy), noisy[:, 1:]], dim=1)
        mask[:, :1] = 1
    return torch.cat([noisy, condition, mask], dim=-1)


def check_first_frame(first_frame: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError where first_frame is not one frame of latents of this shape, [B, T, H, W, C]."""
    expected = [shape[0], 1, *shape[2:]]
    if list(first_frame.shape) != expected:
        raise ValueError(f"first_frame: expected {expected}, got {list(first_frame.shape)}")


def check_takes_condition(model: CrossDiT) -> None:
    """Raises ValueError where the model has no channels for a first frame."""
    if not model.config.visual_cond:
        raise ValueError("first_frame: this model takes no condition (config.visual_cond is False); pass None")


def flow_matching_loss(
    model: CrossDiT,
    latents: Tensor,
    text: TextCondition,
    generator: torch.Generator,
    first_frame: Tensor | None = None,
    *,
    scheduler_scale: float | None = None,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    attention: AttentionConfig = DENSE,
    own: slice = EVERY,
) -> Tensor:
    """Mean squared error of the velocity, at one uniform time a sample: a float32 scalar, the mean over samples.

    model: CrossDiT. latents: [B, T, H, W, C], clean. text: in the dtype the model computes in; its input is cast to it.
    first_frame: [B] bool, the samples trained image to video: their first frame is given clean and does not count.
    scheduler_scale: shifts the times as it shifts the sampler's grid. generator: draws times and noise on its own
    device; all else is computed on the device of text. own: the samples that are computed, and those text is of; times
    and noise are drawn for all B, so that processes that share a batch agree on them.

    Raises ValueError where first_frame does not fit, leaves a one-frame latent nothing to learn, or is asked of a model
    that takes no condition.
    """
    given = torch.zeros(latents.shape[0], dtype=torch.bool) if first_frame is None else first_frame
    _check_given(model, given, latents)
    latents, given, time, noise = (
        tensor[own].to(text.tokens.device) for tensor in (latents.float(), given, *_draw(latents.shape, generator))
    )
    time = shift_time(time, scheduler_scale)
    x = noisy_latent(latents, noise, time)
    if model.config.visual_cond:
        x = torch.where(given[:, None, None, None, None], condition_input(x, latents[:, :1]), condition_input(x))
    x = x.to(text.tokens.dtype)
    velocity = latent_velocity(model, x, time * TIME_UNITS, text, rope_scale=rope_scale, attention=attention)
    error = (velocity.float() - (noise - latents)).square().mean(dim=(2, 3, 4))
    counted = torch.ones_like(error)
    counted[given, 0] = 0
    return ((error * counted).sum(1) / counted.sum(1)).mean()


def _draw(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    time = torch.rand(shape[0], generator=generator, device=generator.device)
    return time, torch.randn(shape, generator=generator, device=generator.device)


def _check_given(model: CrossDiT, given: Tensor, latents: Tensor) -> None:
    if given.dtype != torch.bool or given.shape != latents.shape[:1]:
        raise ValueError(
            f"first_frame: expected bool [{latents.shape[0]}], one a sample, got {given.dtype} {list(given.shape)}"
        )
    if not given.any():
        return
    check_takes_condition(model)
    if latents.shape[1] == 1:
        raise ValueError("first_frame: a latent of one frame has no further frame to predict; pass None")
