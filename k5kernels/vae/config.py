"""What a HunyuanVideo VAE is made of (§7.1)."""

from dataclasses import dataclass

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the VAE; the defaults are HunyuanVideo's.

    widths: channels of the four resolutions, each a multiple of `groups`. groups: of every GroupNorm.
    layers_per_block: residual blocks of a resolution in the encoder; the decoder has one more.
    scaling_factor: latents are multiplied by it, so that their standard deviation is about one.

    Raises ValueError where a number is below 1 or a width is no multiple of `groups`.
    """

    widths: tuple[int, int, int, int] = (128, 256, 512, 512)
    groups: int = 32
    layers_per_block: int = 2
    latent_channels: int = 16
    scaling_factor: float = 0.476986

    def __post_init__(self) -> None:
        for name in ("groups", "layers_per_block", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if len(self.widths) != 4 or any(width <= 0 or width % self.groups for width in self.widths):
            raise ValueError(f"widths: expected four positive multiples of groups={self.groups}, got {self.widths}")


def whole_latent_frames(frames: int) -> bool:
    """Whether so many video frames fill their latent frames: 1 + a multiple of 4."""
    return frames >= 1 and (frames - 1) % TEMPORAL_STRIDE == 0


def latent_frames(frames: int) -> int:
    """Latent frames that `frames` video frames become: one of the first frame, then one of every four.

    Raises ValueError where `frames` is not 1 + a multiple of 4.
    """
    if not whole_latent_frames(frames):
        raise ValueError(f"frames: expected 1 + a multiple of {TEMPORAL_STRIDE}, got {frames}")
    return 1 + (frames - 1) // TEMPORAL_STRIDE
