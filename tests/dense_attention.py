"""What block-sparse attention must equal: PyTorch's dense attention under a mask over tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from k5kernels import BlockMask, TokenLayout


def over_tokens(blocks: Tensor, layout: TokenLayout) -> Tensor:
    """A dense mask over blocks [..., N_b, N_b] as one over tokens [..., S, S]."""
    lengths = layout.block_starts(blocks.device).diff()
    return blocks.repeat_interleave(lengths, dim=-2).repeat_interleave(lengths, dim=-1)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, layout: TokenLayout, scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention under the mask; zeros where a row reads nothing."""
    tokens = over_tokens(mask.to_dense(), layout)
    out = scaled_dot_product_attention(q, k, v, attn_mask=tokens, scale=scale)
    return out.masked_fill(~tokens.any(-1, keepdim=True), 0)


def random_tokens(layout: TokenLayout, batch: int, heads: int, dim: int, seed: int = 0, **options) -> list[Tensor]:
    """q, k, v: [B, h, S, D], peaked enough that a mask matters."""
    random = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.tokens, dim)
    return [(2 * torch.randn(shape, generator=random)).to(**options) for _ in range(3)]


def far_apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape [1, h, S, D], the same with steps of 2^25 elements from a token to the next.

    Of the memory between, which the system gives when it is written, next to nothing is touched.
    """
    step = 1 << 25
    _, heads, tokens, dim = tensors[0].shape
    memory = torch.empty(tokens * step, dtype=tensors[0].dtype)
    return [
        memory.as_strided(x.shape, (0, dim, step, 1), heads * dim * place).copy_(x) for place, x in enumerate(tensors)
    ]
