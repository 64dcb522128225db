"""Block masks that tests build, select and compare."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k5kernels import BlockMask, TokenLayout, sta_mask


def one_token_blocks(*clips: int) -> TokenLayout:
    """A layout whose blocks are its tokens, so that the map over blocks is the map over tokens."""
    return TokenLayout([(tokens, 1, 1) for tokens in clips], block_side=1)


def same_clip(layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
    """Bool [N_b, N_b], true for blocks of one clip."""
    clip = layout.block_coordinates(device)[:, 0]
    return clip[:, None] == clip


def random_dense(layout: TokenLayout, batch: int, heads: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """Bool [batch, heads, N_b, N_b] within clips, differing per batch and head; row 1 reads nothing."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.rand(batch, heads, layout.blocks, layout.blocks, generator=random) < density
    dense &= same_clip(layout)
    dense[:, :, 1] = False
    return dense


def random_mask(
    layout: TokenLayout, batch: int, heads: int, density: float = 0.5, seed: int = 0, device: str = "cpu"
) -> BlockMask:
    """`random_dense` as lists."""
    return BlockMask.from_dense(random_dense(layout, batch, heads, density, seed).to(device), layout)


def same_lists(one: BlockMask, other: BlockMask) -> bool:
    return torch.equal(one.offsets, other.offsets) and torch.equal(one.indices, other.indices)


def select(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    thr: float,
    window: tuple[int, int, int] | None = None,
) -> BlockMask:
    """The mask by one of the functions that have the arguments of `nabla_mask_reference`."""
    near: tuple[Tensor | None, Tensor | None] = (None, None)
    if window:
        mask = sta_mask(layout, window, q.device)
        near = (mask.offsets, mask.indices)
    starts, clips = layout.block_starts(q.device), layout.clip_block_starts(q.device)
    sizes = (layout.max_block_tokens, layout.max_clip_blocks)
    return BlockMask(*function(q, k, starts, clips, *sizes, thr, *near), layout)


def block_logits(q: Tensor, k: Tensor, layout: TokenLayout) -> Tensor:
    """What NABLA's softmax runs over, in float64: [B, h, N_b, N_b], -inf between blocks of different clips."""
    lengths = layout.block_starts(q.device).diff()
    means = torch.eye(layout.blocks, dtype=torch.float64, device=q.device) / lengths[:, None]
    q_means, k_means = (means.repeat_interleave(lengths, dim=1) @ x.double() for x in (q, k))
    logits = q_means @ k_means.mT / math.sqrt(q.shape[-1])
    return logits.masked_fill(~same_clip(layout, q.device), -torch.inf)


def assert_rows_keep_their_largest_block_alone(kept: Tensor, logits: Tensor) -> None:
    """kept: bool of the shape of logits. Where several are within rounding of the largest, any of them may be kept."""
    assert (kept.sum(-1) == 1).all()
    largest = logits.amax(-1, keepdim=True)
    assert (logits >= largest - 1e-5 * largest.abs().clamp(min=1))[kept].all()
