"""HunyuanVideo VAE decoder: latents to video in [-1, 1] (§7.1)."""

import torch
from torch import Tensor, nn

from k5kernels.vae.config import VAEConfig
from k5kernels.vae.layers import EPS, CausalConv3d, MidBlock, NormSiLU, UpBlock

# What each block multiplies time, height and width by; the first frame is never copied in time.
FACTORS = ((1, 2, 2), (2, 2, 2), (2, 2, 2), None)


class HunyuanDecoder(nn.Module):
    """Decoder with the released weights' names (`decoder.` stripped, `post_quant_conv` kept)."""

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.widths[::-1], config.groups
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(above, width, groups, config.layers_per_block + 1, factor)
                for above, width, factor in zip(widths[:1] + widths[:-1], widths, FACTORS, strict=True)
            ]
        )
        self.conv_norm_out = NormSiLU(groups, widths[-1], EPS)
        self.conv_out = CausalConv3d(widths[-1], 3)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stub lacks it

    def forward(self, latent: Tensor) -> Tensor:
        """Video [B, 3, 1 + 4(T - 1), 8h, 8w] of a scaled latent [B, 16, T, h, w]; not clamped to [-1, 1].

        Raises ValueError where the latent has other than `config.latent_channels` channels.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"latent: expected [B, {self.config.latent_channels}, T, h, w], got {list(latent.shape)}")
        x = (latent / self.config.scaling_factor).contiguous(memory_format=torch.channels_last_3d)
        x = self.mid_block(self.conv_in(self.post_quant_conv(x)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))
