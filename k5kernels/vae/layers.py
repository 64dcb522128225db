"""Layers of the HunyuanVideo 3-D causal VAE (§7.1); parameter names follow the released weights.

Shapes: x is [B, C, T, H, W], best in `torch.channels_last_3d`, which CPU convolutions need to be fast.
Convolutions and attention never look into the future: a convolution pads time with copies of the first frame,
attention is causal in frames. GroupNorm does: its statistics are taken over all frames of the clip.

`forward` takes a whole clip. `forward_chunk` takes the next frames of one: it is given the statistics of the whole
clip where it normalizes, and `before`, what it returned as `after` for the chunk before, None for the first. The
outputs of the chunks, joined, are those of `forward` on the whole clip. Chunks may have any number of frames, the
first at least one; where a stride in time leaves a chunk without output, that output has no frames.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5kernels.memory_format import memory_format_like
from k5kernels.ops.groupnorm_silu import EPS, groupnorm_silu
from k5kernels.ops.groupnorm_silu_apply import groupnorm_silu_apply
from k5kernels.ops.groupnorm_silu_padded import groupnorm_silu_padded
from k5kernels.ops.groupnorm_statistics import GroupStatistics, groupnorm_statistics, normalize
from k5kernels.vae.convolution import UnpaddedConv3d


class CausalConv3d(nn.Module):
    """Convolution with a cubic kernel; edges repeat in space, the first frame repeats before time 0.

    Raises ValueError where the kernel is smaller than the stride in time: chunks would have to skip frames.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        if kernel < stride[0]:
            raise ValueError(f"kernel: expected at least the stride in time, {stride[0]}, got {kernel}")
        self.kernel, self.stride = kernel, stride
        self.conv = UnpaddedConv3d(channels_in, channels_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == 1:
            return self._convolve(x)
        side = self.kernel // 2
        return self._convolve(F.pad(x, (side, side, side, side, self.kernel - 1, 0), mode="replicate"))

    def forward_chunk(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and `after`: the frames of x, and of `before`, that the next output needs; fewer than the kernel's.

        Raises ValueError where `before` does not fit x, or the first chunk has no frame.
        """
        B, C, T, H, W = x.shape
        if before is None and T == 0:
            raise ValueError("x: expected at least one frame in the first chunk, got none")
        past = x[:, :, :1].expand(-1, -1, self.kernel - 1, -1, -1) if before is None else before
        if past.ndim != 5 or (*past.shape[:2], *past.shape[3:]) != (B, C, H, W) or past.dtype != x.dtype:
            raise ValueError(f"before: expected {x.dtype} {[B, C, 'T', H, W]}, got {past.dtype} {list(past.shape)}")
        side, kept = self.kernel // 2, past.shape[2]
        shape = (B, C, kept + T, H + 2 * side, W + 2 * side)
        # Written once: joining and then padding would copy the chunk twice, and lose the order of its dimensions.
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_like(x))
        frames = padded[:, :, :, side : side + H, side : side + W]
        frames[:, :, :kept], frames[:, :, kept:] = past, x
        for edge in range(side):
            padded[:, :, :, edge], padded[:, :, :, side + H + edge] = (
                padded[:, :, :, side],
                padded[:, :, :, side + H - 1],
            )
        for edge in range(side):
            padded[..., edge], padded[..., side + W + edge] = padded[..., side], padded[..., side + W - 1]
        out = self._convolve(padded)
        after = frames[:, :, out.shape[2] * self.stride[0] :].clone()  # a view would keep all frames in memory
        return out, after

    def forward_padded(self, padded: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `forward_chunk`, of a chunk that `NormSiLU.padded` made; the stride in time is 1.

        before: the last frames of the chunk before, padded; they take the place of the copies of the first frame.
        """
        past = self.kernel - 1
        if before is not None:
            padded[:, :, :past] = before
        return self.conv(padded), padded[:, :, padded.shape[2] - past :].clone()

    def _convolve(self, padded: Tensor) -> Tensor:
        if padded.shape[2] >= self.kernel:
            return self.conv(padded)
        # PyTorch refuses a convolution without output.
        height, width = (
            (side - self.kernel) // stride + 1 for side, stride in zip(padded.shape[3:], self.stride[1:], strict=True)
        )
        return padded.new_empty(padded.shape[0], self.conv.out_channels, 0, height, width)


class Norm(nn.GroupNorm):
    """GroupNorm over frames and pixels together, by the statistics of x or by given ones."""

    def forward(self, x: Tensor, statistics: GroupStatistics | None = None) -> Tensor:
        if statistics is None:
            return super().forward(x)
        normalized = normalize(x, statistics.mean, statistics.variance, self.eps)
        weight, bias = (parameter.view(-1, *(1,) * (x.ndim - 2)) for parameter in (self.weight, self.bias))
        return (normalized * weight + bias).to(x.dtype)


class NormSiLU(nn.GroupNorm):
    """GroupNorm over frames and pixels together, by the statistics of x or by given ones, then SiLU."""

    def forward(self, x: Tensor, statistics: GroupStatistics | None = None) -> Tensor:
        if statistics is None:
            return groupnorm_silu(x, self.weight, self.bias, self.num_groups, self.eps)
        return groupnorm_silu_apply(x, statistics, self.weight, self.bias, self.eps)

    def padded(self, x: Tensor, statistics: GroupStatistics | None, kernel: int) -> Tensor:
        """Normalized, activated and padded for a causal convolution with a cubic kernel, in one pass over x."""
        if statistics is None:
            statistics = groupnorm_statistics(x, self.num_groups)
        pad = (kernel - 1, kernel // 2, kernel // 2)
        return groupnorm_silu_padded(x, statistics, self.weight, self.bias, pad, self.eps)


def normalized_convolution(norm: NormSiLU, conv: CausalConv3d, x: Tensor) -> Tensor:
    """conv(norm(x)) of a whole clip; the convolution has unit strides."""
    return conv.conv(norm.padded(x, None, conv.kernel))


def normalized_convolution_chunk(
    norm: NormSiLU, conv: CausalConv3d, x: Tensor, statistics: GroupStatistics, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of a chunk of a clip with these statistics; before, after: as in `CausalConv3d.forward_padded`.

    Raises ValueError where the first chunk has no frame.
    """
    if x.shape[2] > 0:
        return conv.forward_padded(norm.padded(x, statistics, conv.kernel), before)
    if before is None:
        raise ValueError("x: expected at least one frame in the first chunk, got none")
    return x.new_empty(x.shape[0], conv.conv.out_channels, *x.shape[2:]), before


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
        # One name for what is on the way, so that each activation is freed as soon as the next one is there.
        hidden = self.norm1.padded(x, None, self.conv1.kernel)
        hidden = self.conv1.conv(hidden)
        hidden = self.norm2.padded(hidden, None, self.conv2.kernel)
        hidden = self.conv2.conv(hidden)
        return self.shortcut(x) + hidden

    def shortcut(self, x: Tensor) -> Tensor:
        """What of the block's input is added to its output."""
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class FrameCausalAttention(nn.Module):
    """One head over all tokens; a token sees its own frame and the frames before it.

    No mask exists: every query of a frame sees the same keys, so a frame is one call of dense attention. PyTorch's
    memory-efficient kernel takes the head dimension of 512 that no flash kernel takes.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = Norm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, self.group_norm(x), None, None)[0]

    def forward_chunk(
        self,
        x: Tensor,
        statistics: GroupStatistics,
        before: tuple[Tensor, Tensor] | None,
        window: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """statistics: of x. before, after: keys and values of the frames so far, [B, 1, T * H * W, C] each. window:
        frames that a token sees, its own included, and as many are kept; None: all."""
        return self._attend(x, self.group_norm(x, statistics), before, window)

    def _attend(
        self, x: Tensor, normalized: Tensor, before: tuple[Tensor, Tensor] | None, window: int | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, C, T, H, W = x.shape
        tokens = normalized.permute(0, 2, 3, 4, 1).reshape(B, 1, T * H * W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        if before is not None:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        past, frame = k.shape[2] - T * H * W, H * W
        frames = []
        for t in range(T):
            end = past + (t + 1) * frame
            start = 0 if window is None else max(0, end - window * frame)
            keys, values = k[:, :, start:end], v[:, :, start:end]
            frames.append(F.scaled_dot_product_attention(q[:, :, t * frame : (t + 1) * frame], keys, values))
        out = self.to_out[0](torch.cat(frames, dim=2) if T else q)
        if window is not None and k.shape[2] > window * frame:
            k, v = (kept[:, :, -window * frame :].clone() for kept in (k, v))  # a view would keep all frames in memory
        return x + out.view(B, T, H, W, C).permute(0, 4, 1, 2, 3), (k, v)


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

    def forward_chunk(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.conv.forward_chunk(x, before)


class Upsample(nn.Module):
    """Nearest-neighbour copy, then convolution; the first frame is never copied in time."""

    def __init__(self, channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self._copied(x, first_frames=1))

    def forward_chunk(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.conv.forward_chunk(self._copied(x, first_frames=1 if before is None else 0), before)

    def _copied(self, x: Tensor, first_frames: int) -> Tensor:
        """Nearest-neighbour copies, of the first `first_frames` frames in space alone; each is written once."""
        time, height, width = self.factor
        B, C, T, H, W = x.shape
        alone = first_frames if time > 1 else 0
        shape = (B, C, alone + time * (T - alone), height * H, width * W)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        for target, source, times in (
            (out[:, :, :alone], x[:, :, :alone], 1),
            (out[:, :, alone:], x[:, :, alone:], time),
        ):
            copies = target.unflatten(4, (W, width)).unflatten(3, (H, height)).unflatten(2, (source.shape[2], times))
            copies.copy_(source[:, :, :, None, :, None, :, None])
        return out


class DownBlock(nn.Module):
    """Residual blocks, then a strided convolution where `stride` is given."""

    def __init__(
        self, channels_in: int, channels_out: int, groups: int, layers: int, stride: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        self.downsamplers = nn.ModuleList([] if stride is None else [Downsample(channels_out, stride)])

    def layers(self) -> list[nn.Module]:
        """In order. Who runs them holds no more than one's input; a `forward` here would keep the block's until its
        end."""
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling where `factor` is given."""

    def __init__(
        self, channels_in: int, channels_out: int, groups: int, layers: int, factor: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        self.upsamplers = nn.ModuleList([] if factor is None else [Upsample(channels_out, factor)])

    def layers(self) -> list[nn.Module]:
        """As `DownBlock.layers`."""
        return [*self.resnets, *self.upsamplers]
