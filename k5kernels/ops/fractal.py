"""Fractal order of visual tokens and back: the tokens of a block become contiguous (§5.4).

    flat[:, i] = x.flatten(1, 3)[:, layout.permutation()[i]]

Whole tokens are copied: the bits of their values do not change, and no token is added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from k5kernels.ops.library import GPU_DTYPES, Accepts, register
from k5kernels.token_layout import TokenLayout

# Dtypes that the kernels copy.
COPIED_DTYPES = (*GPU_DTYPES, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
ACCEPTS = {"cpu": Accepts(COPIED_DTYPES), "cuda": Accepts(COPIED_DTYPES)}


def fractal_flatten(x: Tensor | Sequence[Tensor], layout: TokenLayout) -> Tensor:
    """Row-major clips to one sequence in fractal order: [B, S, ...].

    x: [B, T, H, W, ...] for a layout of one clip, a list of [B, T_i, H_i, W_i, ...] for several clips; any dtype.
    Differentiable.

    Raises ValueError where x does not fit the layout.
    """
    clips = [x] if isinstance(x, Tensor) else list(x)
    if len(clips) != len(layout.clips):
        raise ValueError(
            f"x: expected {len(layout.clips)} tensors [B, T, H, W, ...], one for each clip of the layout, "
            f"got {len(clips)}"
        )
    for number, (clip, grid) in enumerate(zip(clips, layout.clips, strict=True)):
        if clip.ndim < 4 or tuple(clip.shape[1:4]) != grid:
            raise ValueError(
                f"x: expected [B, {', '.join(map(str, grid))}, ...] for clip {number}, got {list(clip.shape)}"
            )
    flat = [torch.ops.k5.fractal_flatten(clip, layout.block_side) for clip in clips]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def fractal_unflatten(x: Tensor, layout: TokenLayout) -> Tensor | list[Tensor]:
    """The inverse: [B, S, ...] to [B, T, H, W, ...] for a layout of one clip, to a list of those for several clips.

    x: any dtype. Differentiable.

    Raises ValueError where x does not have the layout's number of tokens.
    """
    if x.ndim < 2 or x.shape[1] != layout.tokens:
        raise ValueError(f"x: expected [B, {layout.tokens}, ...] for this layout, got {list(x.shape)}")
    sequences = x.split([T * H * W for T, H, W in layout.clips], dim=1)
    clips = [
        torch.ops.k5.fractal_unflatten(sequence, *grid, layout.block_side)
        for sequence, grid in zip(sequences, layout.clips, strict=True)
    ]
    return clips[0] if len(clips) == 1 else clips


def fractal_flatten_reference(x: Tensor, block_side: int) -> Tensor:
    """The definition, in plain PyTorch, of one clip."""
    T, H, W = x.shape[1:4]
    return x.flatten(1, 3).index_select(1, TokenLayout(((T, H, W),), block_side).permutation(x.device))


def fractal_unflatten_reference(x: Tensor, frames: int, height: int, width: int, block_side: int) -> Tensor:
    """The definition, in plain PyTorch, of one clip."""
    order = TokenLayout(((frames, height, width),), block_side).inverse_permutation(x.device)
    return x.index_select(1, order).unflatten(1, (frames, height, width))


def _flatten_fake(x: Tensor, block_side: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3], *x.shape[4:])


def _unflatten_fake(x: Tensor, frames: int, height: int, width: int, block_side: int) -> Tensor:
    return x.new_empty(x.shape[0], frames, height, width, *x.shape[2:])


def _flatten_setup_context(ctx, inputs, output) -> None:
    x, ctx.block_side = inputs
    ctx.grid = x.shape[1:4]


def _flatten_backward(ctx, grad: Tensor):
    return torch.ops.k5.fractal_unflatten(grad, *ctx.grid, ctx.block_side), None


def _unflatten_setup_context(ctx, inputs, output) -> None:
    ctx.block_side = inputs[-1]


def _unflatten_backward(ctx, grad: Tensor):
    return torch.ops.k5.fractal_flatten(grad, ctx.block_side), None, None, None, None


register(
    fractal_flatten_reference,
    _flatten_fake,
    _flatten_backward,
    _flatten_setup_context,
    accepts=ACCEPTS,
)
register(
    fractal_unflatten_reference,
    _unflatten_fake,
    _unflatten_backward,
    _unflatten_setup_context,
    accepts=ACCEPTS,
)
