"""What the model is told besides the noisy latent: text."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Encoded text of a batch (§5.1).

    tokens: [B, L, in_text_dim]. mask: bool [B, L], False on padding; None where every token is valid.
    pooled: [B, in_text_dim2], one embedding of the whole text.

    Raises ValueError where the shapes do not fit each other.
    """

    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(f"text tokens: expected [B, L, width], got {list(self.tokens.shape)}")
        batch, length, _ = self.tokens.shape
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != (batch, length)):
            raise ValueError(
                f"text mask: expected bool {[batch, length]}, got {self.mask.dtype} {list(self.mask.shape)}"
            )
        if self.pooled.ndim != 2 or self.pooled.shape[0] != batch:
            raise ValueError(f"pooled text: expected [{batch}, width], got {list(self.pooled.shape)}")
