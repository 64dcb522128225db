"""How large the activations of a half of the VAE are: what its memory is planned from (§7.1)."""

import math
from dataclasses import dataclass
from itertools import pairwise

from k5kernels.vae.config import VAEConfig

# (time, space): how many of the video's frames, and pixels along a side, stand behind one of an activation.
Resolution = tuple[int, int]
ENCODER_RESOLUTIONS: tuple[Resolution, ...] = ((1, 1), (1, 2), (2, 4), (4, 8))
DECODER_RESOLUTIONS: tuple[Resolution, ...] = ((4, 8), (4, 4), (2, 2), (1, 1))
KERNEL = 3


@dataclass(frozen=True)
class Volume:
    """A video's size: frames F = 1 + a multiple of 4, height and width in pixels, multiples of 8."""

    frames: int
    height: int
    width: int

    def values(self, channels: int, resolution: Resolution, frames: int | None = None) -> int:
        """Of an activation; frames: so many of the video's, not the first one among them, instead of all."""
        time, space = resolution
        count = 1 + (self.frames - 1) // time if frames is None else math.ceil(frames / time)
        return channels * count * (self.height // space) * (self.width // space)


@dataclass(frozen=True)
class StepSize:
    """A step's channels and resolutions. taps: frames its kernel spans. residual: channels
    that are kept beside its input, at the input's resolution. attention: whether it keeps keys and values."""

    channels_in: int
    channels_out: int
    resolution_in: Resolution
    resolution_out: Resolution
    taps: int = KERNEL
    residual: int = 0
    attention: bool = False


def encoder_sizes(config: VAEConfig) -> list[StepSize]:
    """Of the encoder's steps in order."""
    pixels, latents = ENCODER_RESOLUTIONS[0], ENCODER_RESOLUTIONS[-1]
    sizes = [StepSize(3, config.widths[0], pixels, pixels)]
    sizes += _blocks((config.widths[0], *config.widths), ENCODER_RESOLUTIONS, config.layers_per_block)
    width, moments = config.widths[-1], 2 * config.latent_channels
    return [*sizes, *_middle(width), StepSize(width, moments, latents, latents), _pointwise(moments)]


def decoder_sizes(config: VAEConfig) -> list[StepSize]:
    """Of the decoder's steps in order."""
    pixels, latents = DECODER_RESOLUTIONS[-1], DECODER_RESOLUTIONS[0]
    width, channels = config.widths[-1], config.latent_channels
    sizes = [_pointwise(channels), StepSize(channels, width, latents, latents), *_middle(width)]
    sizes += _blocks((width, *reversed(config.widths)), DECODER_RESOLUTIONS, config.layers_per_block + 1)
    return [*sizes, StepSize(config.widths[0], 3, pixels, pixels)]


def _blocks(widths: tuple[int, ...], resolutions: tuple[Resolution, ...], layers: int) -> list[StepSize]:
    sizes = []
    for number, (below, width) in enumerate(pairwise(widths)):
        here = resolutions[number]
        for layer in range(layers):
            sizes += _resnet(width if layer else below, width, here)
        if number + 1 < len(resolutions):
            sizes.append(StepSize(width, width, here, resolutions[number + 1]))
    return sizes


def _resnet(channels_in: int, channels_out: int, here: Resolution) -> list[StepSize]:
    return [
        StepSize(channels_in, channels_out, here, here),
        StepSize(channels_out, channels_out, here, here, residual=channels_in),
    ]


def _middle(width: int) -> list[StepSize]:
    here = ENCODER_RESOLUTIONS[-1]
    return [
        *_resnet(width, width, here),
        StepSize(width, width, here, here, taps=1, attention=True),
        *_resnet(width, width, here),
    ]


def _pointwise(channels: int) -> StepSize:
    return StepSize(channels, channels, ENCODER_RESOLUTIONS[-1], ENCODER_RESOLUTIONS[-1], taps=1)
