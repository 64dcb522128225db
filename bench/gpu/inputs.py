"""What is measured: tokens as a model's, so that NABLA finds blocks worth more than others, and masks over them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shaped_block import DIRECTION, NOISE, ROPE_SCALE
from k5kernels import BlockMask, TokenLayout, nabla_mask
from model.rope import visual_rope

THRESHOLDS = (0.9, 0.7, 0.4)
STA = (11, 3, 3)
RANDOM_DENSITY = 0.1


@dataclass(frozen=True)
class Size:
    """axes: channels of the rotary embedding for time, height and width; they sum to the head dimension."""

    name: str
    clip: tuple[int, int, int]
    heads: int
    axes: tuple[int, int, int]

    @property
    def head_dim(self) -> int:
        return sum(self.axes)

    def __str__(self) -> str:
        return f"{self.name} {self.clip}, {self.heads} × {self.head_dim}"


LITE = Size("Lite 10 s", (61, 32, 48), 28, (16, 24, 24))
PRO = Size("Pro 5 s HD", (31, 48, 80), 32, (32, 48, 48))
SIZES = (PRO, LITE)
TINY = (Size("tiny", (2, 16, 24), 2, (4, 6, 6)),)  # to try the sections without a GPU


@dataclass(frozen=True)
class Tokens:
    """q, k, v: bf16 [1, h, S, D], views of [1, S, h, D] as projections leave them."""

    layout: TokenLayout
    q: Tensor
    k: Tensor
    v: Tensor


def tokens_with_locality(size: Size, device: torch.device) -> Tokens:
    """q and k: a normal vector a head, times 1.6, and normal noise a token, times 0.7, rotated by the model's 3-D
    rotary embedding, so that near tokens attend to each other most. v: normal."""
    random = torch.Generator(device).manual_seed(0)
    layout = TokenLayout((size.clip,))
    cos, sin = (x[:, None] for x in visual_rope(layout, size.axes, ROPE_SCALE, device))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, size.heads, size.head_dim, device=device, generator=random)

    direction = DIRECTION * normal(1)

    def rotated() -> Tensor:
        x = direction + NOISE * normal(layout.tokens)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    q, k, v = (x.to(torch.bfloat16)[None].transpose(1, 2) for x in (rotated(), rotated(), normal(layout.tokens)))
    return Tokens(layout, q, k, v)


def masks(tokens: Tokens) -> dict[str, BlockMask]:
    """By name: NABLA's at three thresholds with a Sliding-Tile window, one at random, and one that keeps all."""
    found = {f"NABLA {thr} ∪ STA": nabla_mask(tokens.q, tokens.k, tokens.layout, thr, STA) for thr in THRESHOLDS}
    blocks, device = tokens.layout.blocks, tokens.q.device
    random = torch.Generator(device).manual_seed(1)
    dense = torch.rand(1, tokens.q.shape[1], blocks, blocks, device=device, generator=random) < RANDOM_DENSITY
    dense |= torch.eye(blocks, dtype=torch.bool, device=device)
    found["random 10%"] = BlockMask.from_dense(dense, tokens.layout)
    found["all"] = BlockMask.from_dense(torch.ones(blocks, blocks, dtype=torch.bool, device=device), tokens.layout)
    return found


def products(mask: BlockMask, tokens: Tokens) -> float:
    """Floating-point operations of the forward over the kept blocks."""
    shared = tokens.q.shape[1] if mask.offsets.shape[1] == 1 else 1
    side = tokens.layout.block_side**2
    return 4.0 * side * side * tokens.q.shape[3] * mask.indices.shape[0] * shared
