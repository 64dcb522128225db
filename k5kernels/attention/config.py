"""How a model's visual self-attention runs: dense, or NABLA (§5.4)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionConfig:
    """Visual self-attention: dense, or NABLA (§5.4) with the probability mass kept and an optional tile window.

    thr: 0 to 1, higher is denser. sta: sliding-tile window (wT, wH, wW) in blocks, None for no union.
    """

    kind: Literal["dense", "nabla"] = "dense"
    thr: float = 0.9
    sta: tuple[int, int, int] | None = (11, 3, 3)

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "nabla"):
            raise ValueError(f'kind: expected "dense" or "nabla", got {self.kind!r}')
        if not 0 <= self.thr <= 1:
            raise ValueError(f"thr: expected the probability mass to keep, 0 to 1, got {self.thr}")
        if self.sta is not None and (len(self.sta) != 3 or min(self.sta) < 1):
            raise ValueError(f"sta: expected three positive numbers (wT, wH, wW) or None, got {self.sta}")


DENSE = AttentionConfig()
