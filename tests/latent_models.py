"""A stand-in for CrossDiT whose velocity is a function of the latent."""

from abc import ABC, abstractmethod
from types import SimpleNamespace

from torch import Tensor, nn

from k5kernels.text_condition import TextCondition
from model.latent_tokens import from_tokens, to_tokens

CELL = (1, 1, 1)


class LatentModel(nn.Module, ABC):
    """Takes tokens of one latent cell each, as CrossDiT takes its patches; `velocity` is what a test makes of them."""

    def __init__(self, visual_cond: bool = True):
        super().__init__()
        channels = 33 if visual_cond else 16
        self.config = SimpleNamespace(visual_cond=visual_cond, patch_size=CELL, input_channels=channels)

    def forward(self, x, time, text, layout, *, rope_scale, attention, cache=None):
        (latent,) = from_tokens(x, layout, CELL)
        return to_tokens([self.velocity(latent, time, text, cache)], layout, CELL)

    @abstractmethod
    def velocity(self, x: Tensor, time: Tensor, text: TextCondition, cache=None) -> Tensor:
        """[B, T, H, W, 16] of x [B, T, H, W, input_channels]."""
