"""HunyuanVideo VAE encoder: video in [-1, 1] to latents, 8x8 in space and 4 in time (§7.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from k5kernels.vae.coding import Whole, fill_up, run_plan
from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig, whole_latent_frames
from k5kernels.vae.layers import EPS, CausalConv3d, DownBlock, MidBlock, NormSiLU, normalized_convolution
from k5kernels.vae.plan import Mode, Plan, plan
from k5kernels.vae.posterior import Posterior
from k5kernels.vae.steps import Step, steps_of
from k5kernels.vae.tiling import Tiling

# Space shrinks in the first three blocks, time in the second and the third.
STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), None)


class HunyuanEncoder(nn.Module):
    """Encoder with the released weights' names (`encoder.` stripped, `quant_conv` kept).

    `encode` is for use, in three modes. `moments` and `forward` take the whole clip at once and are differentiable;
    their memory grows with frames x height x width.
    """

    # What stands before the released names: of all modules, and of the pointwise convolution.
    RELEASED_NAMES: ClassVar = ("encoder.", "quant_conv.")

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

    @classmethod
    def from_diffusers(cls, vae: nn.Module) -> "HunyuanEncoder":
        """The encoder of diffusers' AutoencoderKLHunyuanVideo: a copy of its weights, in its dtype, on its device.

        Raises ValueError where it is another model.
        """
        from k5kernels.vae.weights import half_of_diffusers  # which imports this file

        return half_of_diffusers(vae, cls)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "HunyuanEncoder":
        """As `k5kernels.vae.weights.load_encoder`."""
        from k5kernels.vae.weights import load_encoder

        return load_encoder(path)

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
        posterior = Posterior.from_moments(self.run_tile(video))
        return posterior.mean, posterior.logvar

    def run_tile(self, video: Tensor) -> Tensor:
        """The moments [B, 32, T, h, w] of a video, whole and differentiable; shapes are not checked."""
        x = self.conv_in(video.contiguous(memory_format=torch.channels_last_3d))
        for block in self.down_blocks:
            assert isinstance(block, DownBlock)  # which the type of a ModuleList does not say
            for layer in block.layers():
                x = layer(x)
        return self.quant_conv(normalized_convolution(self.conv_norm_out, self.conv_out, self.mid_block(x)))

    def plan(
        self,
        shape: Sequence[int],
        mode: Mode = "stream",
        memory_budget: int | None = None,
        *,
        tiling: Tiling = Tiling(),
        lookback: int | None = None,
    ) -> Plan:
        """What `encode` does with a video of this shape, [B, 3, F, H, W]; arguments and errors as there."""
        if len(shape) != 5 or shape[1] != 3 or min(shape) < 1:
            raise ValueError(f"video: expected [B, 3, frames, height, width], got {list(shape)}")
        batch, _, frames, height, width = shape
        if not whole_latent_frames(frames):
            fewer = frames - (frames - 1) % TEMPORAL_STRIDE
            raise ValueError(
                f"video: expected 1 + a multiple of {TEMPORAL_STRIDE} frames, got {frames}; "
                f"give {fewer} or {fewer + TEMPORAL_STRIDE}"
            )
        height, width = (-(-side // SPATIAL_STRIDE) * SPATIAL_STRIDE for side in (height, width))
        value_bytes = self.conv_in.conv.weight.element_size()
        sizes = (batch, frames, height, width)
        return plan(self.config, "encoder", sizes, mode, memory_budget, value_bytes, tiling, lookback)

    @torch.no_grad()
    def encode(
        self,
        video: Tensor,
        mode: Mode = "stream",
        memory_budget: int | None = None,
        *,
        tiling: Tiling = Tiling(),
        lookback: int | None = None,
        runner: Whole | None = None,
    ) -> Posterior:
        """Posterior of the unscaled latent, [B, 16, 1 + (F - 1)/4, ceil(H/8), ceil(W/8)].

        video: [B, 3, F, H, W] in [-1, 1], F = 1 + a multiple of 4 (1 for images), any H and W: sides that are no
        multiples of 8 are filled up by reflection at the bottom and the right; a decoder's output is cropped to the
        original size.
        mode:
        - "exact": what the whole clip at once gives, but for rounding. Layer by layer, in chunks of frames.
        - "stream": in one pass over chunks of frames, by statistics of a sample of the clip (`k5kernels.vae.sample`).
          Memory does not grow with the clip's length, but for the keys and values of attention. Up to 33 frames it is
          "exact".
        - "tile": tiles of `tiling.frames` frames, each for itself, as Kandinsky's latents were made.
        memory_budget: bytes for activations on the device, beyond weights, video and latents; None: no limit. What of
        `exact` does not fit waits in host memory, on a CPU in files of the folder for temporary files. `tile` cuts
        frames in tiles too where they do not fit, so that its latents depend on the budget. On a CPU in float32 the
        convolutions keep transformed weights beside it, four times the weights, and use up to 20 MiB a thread.
        lookback: of `stream`: latent frames that attention sees; None: all, as in training.
        runner: of `tile`: what runs a tile (`k5kernels.vae.tile_runners`); None: operator after operator.
        Without gradients. The result depends on nothing but the arguments: no mode asks for free memory.
        Raises ValueError for shapes, modes and numbers that do not fit, and where the budget is too small.
        """
        plan = self.plan(video.shape, mode, memory_budget, tiling=tiling, lookback=lookback)
        weight = self.conv_in.conv.weight
        video = fill_up(video.to(weight.device, weight.dtype))
        return Posterior.from_moments(run_plan(plan, self.steps(plan.lookback), video, runner or self.run_tile))

    def steps(self, lookback: int | None = None) -> list[Step]:
        """The encoder as steps that take chunks of frames; lookback: as in `encode`."""
        out = (self.conv_norm_out, self.conv_out)
        return steps_of([self.conv_in, *self.down_blocks, self.mid_block, out, self.quant_conv], lookback)

    def forward(self, video: Tensor) -> Tensor:
        """Latent [B, 16, T, h, w], scaled to a standard deviation of about one: the mean, no sampling."""
        return self.moments(video)[0] * self.config.scaling_factor
