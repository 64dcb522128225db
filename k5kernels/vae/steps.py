"""A half of the VAE as a list of steps, each of which takes frames in chunks and normalizes at most once (§7.1).

Encoder and decoder are lists of the same kinds of steps. `k5kernels.vae.passes` runs a list chunk by chunk through all
steps, or step by step over all chunks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from k5kernels.ops.groupnorm_statistics import GroupStatistics
from k5kernels.vae.layers import (
    CausalConv3d,
    DownBlock,
    Downsample,
    FrameCausalAttention,
    MidBlock,
    NormSiLU,
    ResnetBlock,
    UpBlock,
    Upsample,
    normalized_convolution_chunk,
)

# Of a chunk, the statistics of the clip where the step normalizes, and what the step kept of the chunks before; gives
# the output and what to keep.
Run = Callable[[Tensor, GroupStatistics | None, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Step:
    """groups: of the step's GroupNorm; None where it does not normalize.

    opens_residual: whether the step's input is added to the output of the next step that has a `shortcut`, as the
    shortcut makes it.
    """

    run: Run
    groups: int | None = None
    opens_residual: bool = False
    shortcut: Callable[[Tensor], Tensor] | None = None


def steps_of(layers: Iterable[nn.Module | tuple[NormSiLU, CausalConv3d]], window: int | None) -> list[Step]:
    """layers: of a half, in order; a pair is a norm and the convolution after it. window: latent frames that attention
    looks back on, its own included; None: all."""
    return [step for layer in layers for step in _steps_of_layer(layer, window)]


def _steps_of_layer(layer: nn.Module | tuple[NormSiLU, CausalConv3d], window: int | None) -> list[Step]:
    match layer:
        case (norm, conv):
            return [_normalized(norm, conv)]
        case ResnetBlock():
            return [
                _normalized(layer.norm1, layer.conv1, opens_residual=True),
                _normalized(layer.norm2, layer.conv2, shortcut=layer.shortcut),
            ]
        case MidBlock():
            return steps_of((layer.resnets[0], layer.attentions[0], layer.resnets[1]), window)
        case DownBlock() | UpBlock():
            return steps_of(layer.layers(), window)
        case FrameCausalAttention():
            return [_attention(layer, window)]
        case CausalConv3d() | Downsample() | Upsample():
            return [Step(lambda x, _, before: layer.forward_chunk(x, before))]
        case nn.Conv3d():
            return [Step(lambda x, _, before: (_pointwise(layer, x), None))]
    raise TypeError(f"layer: expected one of the VAE's, got {type(layer).__name__}")


def _normalized(
    norm: NormSiLU,
    conv: CausalConv3d,
    opens_residual: bool = False,
    shortcut: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    def run(x: Tensor, statistics: GroupStatistics | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        assert statistics is not None  # of a step that normalizes
        return normalized_convolution_chunk(norm, conv, x, statistics, before)

    return Step(run, norm.num_groups, opens_residual, shortcut)


def _attention(layer: FrameCausalAttention, window: int | None) -> Step:
    def run(x: Tensor, statistics: GroupStatistics | None, before: Any) -> tuple[Tensor, Any]:
        assert statistics is not None  # of a step that normalizes
        return layer.forward_chunk(x, statistics, before, window)

    return Step(run, layer.group_norm.num_groups)


def _pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    if x.shape[2] == 0:  # PyTorch refuses a convolution without output.
        return x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
    return conv(x)
