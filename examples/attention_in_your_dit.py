"""NABLA attention in a diffusion transformer of your own.

    python examples/attention_in_your_dit.py

Two changes to a dense block: the tokens stand in fractal order, and `nabla_attention` takes the place of
`scaled_dot_product_attention`. Everything else of the model works on single tokens and does not notice.
"""

import torch
from torch import Tensor, nn

import k5kernels as k5


class SelfAttention(nn.Module):
    """Self-attention over the tokens of a video, as any DiT has it."""

    def __init__(self, model_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.out = nn.Linear(model_dim, model_dim)

    def forward(self, x: Tensor, layout: k5.TokenLayout) -> Tensor:
        """x: [B, S, d] in the layout's order."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        # thr: the probability mass that each block of queries keeps; 1 is dense attention.
        out = k5.nabla_attention(q, k, v, layout, thr=0.9)
        return self.out(out.transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    video = torch.randn(1, 5, 20, 36, 128)  # [B, frames, rows, columns, d]: any size, not only multiples of 8
    layout = k5.TokenLayout((5, 20, 36))
    attention = SelfAttention(model_dim=128, heads=2)

    tokens = k5.fractal_flatten(video, layout)  # once, before the first block
    tokens = tokens + attention(tokens, layout)
    result = k5.fractal_unflatten(tokens, layout)  # once, after the last block

    print(f"{list(video.shape)} -> {list(result.shape)}, {layout.tokens} tokens in {layout.blocks} blocks")


if __name__ == "__main__":
    main()
