"""Shift, scale and gate of adaLN (§5.3): which row of a modulation belongs to which token.

Letters: B batch, S tokens of a sequence, d width. A modulation is a floating tensor of one of these shapes:

    [B, d]             one row a sample
    [B * clips, d]     one row a clip, where a TokenLayout says which clips a sequence holds; row b * clips + c belongs
                       to clip c of sample b, so it is [clips, d] for B = 1 and [B, d] for a layout of one clip
    [B, S, d]          one row a token

All samples of a batch hold the same clips. The operators take the layout as `clip_starts`: the token each clip starts
at, then S; [0, S] without a layout. No modulation is ever expanded to one row a token.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from k5kernels.ops.library import GPU_DTYPES, Accepts
from k5kernels.ops.precision import in_float32, upcast
from k5kernels.token_layout import TokenLayout

WIDEST_ROW = 8192  # that a program of a GPU kernel keeps in registers


def clip_starts_of(x: Tensor, layout: TokenLayout | None) -> list[int]:
    """The token each clip of x [B, S, d] starts at, then S; ValueError where the layout has not S tokens."""
    tokens = x.shape[1]
    if layout is None:
        return [0, tokens]
    if layout.tokens != tokens:
        raise ValueError(f"layout: expected one of {tokens} tokens like x {list(x.shape)}, got {layout.tokens} tokens")
    return list(layout.clip_tokens)


def check_modulation(name: str, modulation: Tensor, x: Tensor, clip_starts: Sequence[int]) -> None:
    """Raise ValueError where `modulation` fits no x [B, S, d] of these clips."""
    clips = len(clip_starts) - 1
    rows = (x.shape[0] * clips, x.shape[2])
    # Compared one by one: in a graph of symbolic sizes `in` compares symbols, not sizes.
    fits = modulation.shape == x.shape or modulation.shape == rows
    if not fits or not modulation.is_floating_point():
        per_row = "a sample" if clips == 1 else f"for each of the layout's {clips} clips, of each sample"
        raise ValueError(
            f"{name}: expected a floating {list(rows)} (one row {per_row}) or {list(x.shape)} (one a token), "
            f"got {modulation.dtype} {list(modulation.shape)}"
        )


def narrow_rows(tensors: int) -> Accepts:
    """What GPU kernels take that keep whole rows of d values in registers, in float32.

    tensors: how many of the operator's first arguments are tensors.
    """
    return Accepts(
        GPU_DTYPES,
        others={
            f"d up to {WIDEST_ROW}": lambda x, *rest: x.shape[-1] <= WIDEST_ROW,
            **in_float32(tensors),
        },
    )


def map_clips(
    function: Callable[..., Tensor], clip_starts: Sequence[int], tokens: Sequence[Tensor], modulations: Sequence[Tensor]
) -> Tensor:
    """`function(*tokens, *modulations)` of each clip, joined to [B, S, d].

    It gets the clip's part of each of `tokens` [B, S, d], and of each modulation, in float32 or better, what broadcasts
    against that: [B, 1, d], or [B, s, d] for the s tokens of the clip.
    """
    clips = len(clip_starts) - 1
    outs = [
        function(*(x[:, start:end] for x in tokens), *(_of_clip(m, clip, clips, start, end) for m in modulations))
        for clip, (start, end) in enumerate(pairwise(clip_starts))
    ]
    return outs[0] if clips == 1 else torch.cat(outs, dim=1)


def sum_to_modulation(grad: Tensor, ndim: int, clip_starts: Sequence[int]) -> Tensor:
    """The gradient of a modulation of `ndim` dimensions from that of its expansion to [B, S, d]; contiguous."""
    if ndim == 3:
        return grad.clone(memory_format=torch.contiguous_format)
    return torch.stack([grad[:, start:end].sum(1) for start, end in pairwise(clip_starts)], dim=1).flatten(0, 1)


def _of_clip(modulation: Tensor, clip: int, clips: int, start: int, end: int) -> Tensor:
    per_token = modulation.ndim == 3
    rows = modulation[:, start:end] if per_token else modulation.unflatten(0, (-1, clips))[:, clip, None]
    return upcast(rows)
