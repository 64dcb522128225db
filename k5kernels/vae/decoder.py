"""HunyuanVideo VAE decoder: latents to video in [-1, 1] (§7.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from k5kernels.vae.coding import Whole, run_plan
from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig
from k5kernels.vae.layers import EPS, CausalConv3d, MidBlock, NormSiLU, UpBlock, normalized_convolution
from k5kernels.vae.plan import Mode, Plan, plan
from k5kernels.vae.steps import Step, steps_of
from k5kernels.vae.tiling import Tiling

# What each block multiplies time, height and width by; the first frame is never copied in time.
FACTORS = ((1, 2, 2), (2, 2, 2), (2, 2, 2), None)


class HunyuanDecoder(nn.Module):
    """Decoder with the released weights' names (`decoder.` stripped, `post_quant_conv` kept).

    `decode` is for use, in the three modes of `HunyuanEncoder.encode`. `forward` takes the whole latent at once and is
    differentiable.
    """

    # What stands before the released names: of all modules, and of the pointwise convolution.
    RELEASED_NAMES: ClassVar = ("decoder.", "post_quant_conv.")

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

    @classmethod
    def from_diffusers(cls, vae: nn.Module) -> "HunyuanDecoder":
        """The decoder of diffusers' AutoencoderKLHunyuanVideo: a copy of its weights, in its dtype, on its device.

        Raises ValueError where it is another model.
        """
        from k5kernels.vae.weights import half_of_diffusers  # which imports this file

        return half_of_diffusers(vae, cls)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "HunyuanDecoder":
        """As `k5kernels.vae.weights.load_decoder`."""
        from k5kernels.vae.weights import load_decoder

        return load_decoder(path)

    def plan(
        self,
        shape: Sequence[int],
        mode: Mode = "stream",
        memory_budget: int | None = None,
        *,
        tiling: Tiling = Tiling(),
        lookback: int | None = None,
    ) -> Plan:
        """What `decode` does with a latent of this shape, [B, 16, T, h, w]; arguments and errors as there."""
        if len(shape) != 5 or shape[1] != self.config.latent_channels or min(shape) < 1:
            raise ValueError(f"latent: expected [B, {self.config.latent_channels}, T, h, w], got {list(shape)}")
        batch, _, frames, height, width = shape
        value_bytes = self.conv_in.conv.weight.element_size()
        sizes = (batch, 1 + TEMPORAL_STRIDE * (frames - 1), SPATIAL_STRIDE * height, SPATIAL_STRIDE * width)
        return plan(self.config, "decoder", sizes, mode, memory_budget, value_bytes, tiling, lookback)

    @torch.no_grad()
    def decode(
        self,
        latent: Tensor,
        mode: Mode = "stream",
        memory_budget: int | None = None,
        *,
        tiling: Tiling = Tiling(),
        lookback: int | None = None,
        runner: Whole | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Video [B, 3, 1 + 4(T - 1), 8h, 8w], not clamped to [-1, 1], of an unscaled latent [B, 16, T, h, w], as
        `Posterior` has it.

        mode, memory_budget, tiling, lookback, runner: as in `HunyuanEncoder.encode`. size: (height, width) of the video
        that was encoded, where its sides are no multiples of 8; what was filled up is cut off.
        Raises ValueError for shapes, modes and numbers that do not fit, and where the budget is too small.
        """
        plan = self.plan(latent.shape, mode, memory_budget, tiling=tiling, lookback=lookback)
        height, width = (plan.height, plan.width) if size is None else size
        if not (0 <= plan.height - height < SPATIAL_STRIDE and 0 <= plan.width - width < SPATIAL_STRIDE):
            raise ValueError(f"size: expected one of a latent of {list(latent.shape[3:])}, got {list(size or ())}")
        weight = self.conv_in.conv.weight
        latent = latent.to(weight.device, weight.dtype)
        return run_plan(plan, self.steps(plan.lookback), latent, runner or self.run_tile)[..., :height, :width]

    def steps(self, lookback: int | None = None) -> list[Step]:
        """The decoder as steps that take chunks of latent frames; lookback: as in `decode`."""
        out = (self.conv_norm_out, self.conv_out)
        return steps_of([self.post_quant_conv, self.conv_in, self.mid_block, *self.up_blocks, out], lookback)

    def forward(self, latent: Tensor) -> Tensor:
        """Video [B, 3, 1 + 4(T - 1), 8h, 8w] of a scaled latent [B, 16, T, h, w]; not clamped to [-1, 1].

        Raises ValueError where the latent has other than `config.latent_channels` channels.
        """
        if latent.ndim != 5 or latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"latent: expected [B, {self.config.latent_channels}, T, h, w], got {list(latent.shape)}")
        return self.run_tile((latent / self.config.scaling_factor).contiguous(memory_format=torch.channels_last_3d))

    def run_tile(self, latent: Tensor) -> Tensor:
        """The video of an unscaled latent, whole and differentiable; shapes are not checked."""
        x = self.mid_block(self.conv_in(self.post_quant_conv(latent)))
        for block in self.up_blocks:
            assert isinstance(block, UpBlock)  # which the type of a ModuleList does not say
            for layer in block.layers():
                x = layer(x)
        return normalized_convolution(self.conv_norm_out, self.conv_out, x)
