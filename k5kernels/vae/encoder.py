"""HunyuanVideo VAE encoder: video in [-1, 1] to latents, 8x8 in space and 4 in time (§7.1)."""

import torch
from torch import Tensor, nn

from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig, whole_latent_frames
from k5kernels.vae.layers import EPS, CausalConv3d, DownBlock, MidBlock, NormSiLU

# Space shrinks in the first three blocks, time in the second and the third.
STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), None)


class HunyuanEncoder(nn.Module):
    """Encoder with the released weights' names (`encoder.` stripped, `quant_conv` kept).

    The whole clip goes through at once, so memory grows with frames x height x width.
    """

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.widths, config.groups
        self.conv_in = CausalConv3d(3, widths[0])
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(below, width, groups, config.layers_per_block, stride)
                for below, width, stride in zip(widths[:1] + widths[:-1], widths, STRIDES, strict=True)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = NormSiLU(groups, widths[-1], EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stub lacks it

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latent, each [B, 16, 1 + (F - 1)/4, H/8, W/8].

        video: [B, 3, F, H, W] in [-1, 1], F = 1 + a multiple of 4, H and W multiples of 8.
        Raises ValueError for any other shape.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video: expected [B, 3, frames, height, width], got {list(video.shape)}")
        if not whole_latent_frames(video.shape[2]):
            raise ValueError(f"video: expected 1 + a multiple of {TEMPORAL_STRIDE} frames, got {video.shape[2]}")
        if any(side < 1 or side % SPATIAL_STRIDE for side in video.shape[3:]):
            raise ValueError(
                f"video: expected sides that are multiples of {SPATIAL_STRIDE}, got {list(video.shape[3:])}"
            )
        x = self.conv_in(video.contiguous(memory_format=torch.channels_last_3d))
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(self.conv_norm_out(self.mid_block(x)))
        mean, log_variance = self.quant_conv(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def forward(self, video: Tensor) -> Tensor:
        """Latent [B, 16, T, h, w], scaled to a standard deviation of about one: the mean, no sampling."""
        return self.moments(video)[0] * self.config.scaling_factor
