"""The VAE of FLUX, which Image Lite learned its latents from, behind the interface of the video encoder (§5.1).

It is diffusers' AutoencoderKL as it is; nothing of it is written again here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k5kernels.vae.coding import fill_up
from k5kernels.vae.config import SPATIAL_STRIDE
from k5kernels.vae.plan import MODES, Mode
from k5kernels.vae.posterior import Posterior


class FluxVAE:
    """Encoder and decoder of images, which are videos of one frame."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae.eval()
        self.config: Any = vae.config  # diffusers': scaling_factor, shift_factor, latent_channels

    @classmethod
    def from_diffusers(cls, vae: nn.Module) -> "FluxVAE":
        """Around diffusers' AutoencoderKL with four resolutions. Raises ValueError where it is another model."""
        widths = getattr(getattr(vae, "config", None), "block_out_channels", ())
        if type(vae).__name__ != "AutoencoderKL" or len(widths) != 4:
            found = f"{type(vae).__name__} with {len(widths)}"
            raise ValueError(f"vae: expected diffusers' AutoencoderKL with 4 resolutions, got {found}")
        return cls(vae)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "FluxVAE":
        """path: a VAE folder in diffusers' layout, or a pipeline's folder that has it in `vae`. Needs diffusers.

        Raises OSError where it cannot be read.
        """
        from diffusers import AutoencoderKL

        folder = Path(path)
        return cls.from_diffusers(
            AutoencoderKL.from_pretrained(folder / "vae" if (folder / "vae").is_dir() else folder)
        )

    @torch.no_grad()
    def encode(self, video: Tensor, mode: Mode = "stream") -> Posterior:
        """Posterior of the unscaled latent, [B, 16, 1, ceil(H/8), ceil(W/8)].

        video: [B, 3, 1, H, W] in [-1, 1], any sides, filled up as `HunyuanEncoder.encode` fills them up. mode: as
        there; for one frame all are the same. Raises ValueError where the shape or the mode does not fit.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] != 1 or min(video.shape) < 1:
            raise ValueError(f"video: expected images [B, 3, 1, height, width], got {list(video.shape)}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        weight = next(self.vae.parameters())
        filled = fill_up(video.to(weight.device, weight.dtype))
        found = self.vae.encode(filled[:, :, 0]).latent_dist
        return Posterior(found.mean[:, :, None], found.logvar[:, :, None])

    @torch.no_grad()
    def decode(self, latent: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Images [B, 3, 1, H, W], not clamped to [-1, 1], of an unscaled latent [B, 16, 1, h, w]; size: (height, width)
        where they are no multiples of 8. Raises ValueError where a shape does not fit."""
        channels = self.config.latent_channels
        if latent.ndim != 5 or latent.shape[1:3] != (channels, 1):
            raise ValueError(f"latent: expected [B, {channels}, 1, h, w], got {list(latent.shape)}")
        full = [SPATIAL_STRIDE * side for side in latent.shape[3:]]
        height, width = full if size is None else size
        if not (0 <= full[0] - height < SPATIAL_STRIDE and 0 <= full[1] - width < SPATIAL_STRIDE):
            raise ValueError(f"size: expected one of a latent of {list(latent.shape[3:])}, got {[height, width]}")
        weight = next(self.vae.parameters())
        images = self.vae.decode(latent[:, :, 0].to(weight.device, weight.dtype)).sample
        return images[:, :, None, :height, :width]
