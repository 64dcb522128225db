"""What a HunyuanVideo VAE is made of (§7.1)."""

from dataclasses import dataclass

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the VAE; the defaults are HunyuanVideo's.

    widths: channels of the four resolutions, each a multiple of `groups`.
    scaling_factor: latents are multiplied by it, so that their standard deviation is about one.
    """

    widths: tuple[int, int, int, int] = (128, 256, 512, 512)
    groups: int = 32
    layers_per_block: int = 2
    latent_channels: int = 16
    scaling_factor: float = 0.476986

    def __post_init__(self) -> None:
        if min(self.groups, self.layers_per_block, self.latent_channels) < 1:
            raise ValueError(f"groups, layers_per_block, latent_channels: expected at least 1 each, got {self}")
        if len(self.widths) != 4 or any(width <= 0 or width % self.groups for width in self.widths):
            raise ValueError(f"widths: expected four positive multiples of groups={self.groups}, got {self.widths}")


def latent_frames(frames: int) -> int:
    """Latent frames that `frames` video frames become: the first stands alone, then four to one."""
    if frames < 1 or (frames - 1) % TEMPORAL_STRIDE:
        raise ValueError(f"frames: expected 1 + a multiple of {TEMPORAL_STRIDE}, got {frames}")
    return 1 + (frames - 1) // TEMPORAL_STRIDE
