"""Queries, keys and values whose blocks differ, so that NABLA finds blocks worth more than others."""

import torch
from torch import Tensor

from k5kernels import TokenLayout


def tokens_alike_in_blocks(layout: TokenLayout, heads: int, dim: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, heads, S, dim] whose tokens differ more between blocks, by `spread`, than inside one, by 0.5."""
    of_blocks = spread * torch.randn(3, 1, heads, layout.blocks, dim)
    of_tokens = 0.5 * torch.randn(3, 1, heads, layout.tokens, dim)
    q, k, v = of_blocks.repeat_interleave(layout.block_starts().diff(), dim=3) + of_tokens
    return q, k, v
