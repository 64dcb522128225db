"""A cache around the blocks of a diffusion transformer of your own.

    python examples/cache_in_your_dit.py

The model stays as it is: a list of blocks, each called with the result of the one before. Step and branch are told
from the arguments of its forward.
"""

import torch
from torch import Tensor, nn

from k5kernels.cache import MagCache, apply


class Block(nn.Module):
    """Any block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: [B, S, d], condition: [B, 1, d]."""
        return x + torch.tanh(self.layer(x + condition))


class Transformer(nn.Module):
    """Any model that runs its blocks one after the other."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """x: [B, S, d], timestep: [B], text: [B, L, d]."""
        condition = text.mean(dim=1, keepdim=True) + timestep.view(-1, 1, 1) / 1000
        for block in self.blocks:
            x = block(x, condition)
        return x


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, steps = Transformer(), 20
    text, negative = torch.randn(1, 5, 64), torch.zeros(1, 5, 64)
    ratios = [1.0] * (steps - 1)  # of your model: measure them with MagCalibration in place of MagCache

    x = torch.randn(1, 100, 64)
    with apply(model, MagCache({"cond": ratios, "uncond": ratios})) as report:
        for time in torch.linspace(1000, 50, steps):
            towards, away = (model(x, time.view(1), one) for one in (text, negative))
            x = x - (away + 5 * (towards - away)) / steps

    print(report)


if __name__ == "__main__":
    main()
