"""Layers of the HunyuanVideo 3-D causal VAE (§7.1); parameter names follow the released weights.

Shapes: x is [B, C, T, H, W], best in `torch.channels_last_3d`, which CPU convolutions need to be fast.
Convolutions and attention never look into the future: a convolution pads time with copies of the first frame,
attention is causal in frames. GroupNorm does: its statistics are taken over all frames of the clip.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5kernels.ops.groupnorm_silu import groupnorm_silu

EPS = 1e-6


class CausalConv3d(nn.Module):
    """Convolution with a cubic kernel; edges repeat in space, the first frame repeats before time 0."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        return self.conv(x)


class NormSiLU(nn.GroupNorm):
    """GroupNorm over frames and pixels together, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return groupnorm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ResnetBlock(nn.Module):
    """Two (GroupNorm, SiLU, convolution) and a residual."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(groups, channels_in, EPS)
        self.conv1 = CausalConv3d(channels_in, channels_out)
        self.norm2 = NormSiLU(groups, channels_out, EPS)
        self.conv2 = CausalConv3d(channels_out, channels_out)
        self.conv_shortcut = CausalConv3d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return residual + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class FrameCausalAttention(nn.Module):
    """One head over all tokens; a token sees its own frame and the frames before it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).reshape(B, 1, T * H * W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        # Frame by frame, so that no [S, S] mask exists: every query of a frame sees the same keys.
        frames = [
            F.scaled_dot_product_attention(
                q[:, :, t * H * W : (t + 1) * H * W], k[:, :, : (t + 1) * H * W], v[:, :, : (t + 1) * H * W]
            )
            for t in range(T)
        ]
        out = self.to_out[0](torch.cat(frames, dim=2))
        return x + out.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Strided convolution."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour copy, then convolution; the first frame is never copied in time."""

    def __init__(self, channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.factor
        x = x.repeat_interleave(height, dim=3).repeat_interleave(width, dim=4)
        if time > 1:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(time, dim=2)], dim=2)
        return self.conv(x.contiguous(memory_format=torch.channels_last_3d))


class DownBlock(nn.Module):
    """Residual blocks, then a strided convolution where `stride` is given."""

    def __init__(
        self, channels_in: int, channels_out: int, groups: int, layers: int, stride: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        self.downsamplers = nn.ModuleList([] if stride is None else [Downsample(channels_out, stride)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling where `factor` is given."""

    def __init__(
        self, channels_in: int, channels_out: int, groups: int, layers: int, factor: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        self.upsamplers = nn.ModuleList([] if factor is None else [Upsample(channels_out, factor)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x
