"""Tables of rotary position embeddings: one axis for text, three for visual tokens (§5.2).

A table is (cos, sin), each [S, D/2] in float32: the angle of pair i of the token at position p is
p · 10000^(-i / pairs). On three axes the first pairs of a head turn with time, the next with height, the last with
width.
"""

import math

import torch
from torch import Tensor

from k5kernels.tensor_cache import cached_tensors
from k5kernels.token_layout import TokenLayout

PERIOD = 10_000.0


def text_rope(length: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(cos, sin) [L, head_dim/2] for positions 0 … L-1."""
    angles = _angles(length, head_dim, 1.0, device)
    return angles.cos(), angles.sin()


@cached_tensors(maxsize=2)  # of one layout every step needs the same; at full size they take 0.1 GB
def visual_rope(
    layout: TokenLayout,
    axes_dims: tuple[int, int, int],
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [S, D/2] of the tokens of a layout, in its order; positions begin anew in each clip.

    axes_dims: channels for each axis, summing to D. scale: positions on each axis are divided by it. The tables of the
    last layouts are kept and shared: do not write to them.
    """
    if min(scale) <= 0:
        raise ValueError(f"rope_scale: expected three positive divisors (t, h, w), got {scale}")
    clips = [_of_clip(grid, axes_dims, scale, device) for grid in layout.clips]
    order = layout.permutation(device or "cpu")
    cos, sin = (torch.cat(tables)[order] for tables in zip(*clips, strict=True))
    return cos, sin


def frequencies(pairs: int, device: torch.device | None = None) -> Tensor:
    """[pairs] float32: 10000^(-i / pairs), radians a position."""
    return torch.exp(torch.arange(pairs, dtype=torch.float32, device=device) * (-math.log(PERIOD) / pairs))


def _angles(length: int, dim: int, divisor: float, device: torch.device | None) -> Tensor:
    positions = torch.arange(length, dtype=torch.float32, device=device) / divisor
    return torch.outer(positions, frequencies(dim // 2, device))


def _of_clip(
    grid: tuple[int, int, int],
    axes_dims: tuple[int, int, int],
    scale: tuple[float, float, float],
    device: torch.device | None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [T·H·W, D/2] of a token grid in row-major order."""
    axes = [_angles(length, dim, divisor, device) for length, dim, divisor in zip(grid, axes_dims, scale, strict=True)]
    return _combine([a.cos() for a in axes]), _combine([a.sin() for a in axes])


def _combine(axes: list[Tensor]) -> Tensor:
    time, height, width = axes
    t, h, w = time.shape[0], height.shape[0], width.shape[0]
    grid = [
        time[:, None, None].expand(t, h, w, -1),
        height[None, :, None].expand(t, h, w, -1),
        width[None, None, :].expand(t, h, w, -1),
    ]
    return torch.cat(grid, dim=-1).flatten(0, 2)
