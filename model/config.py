"""What a CrossDiT is made of, and how its self-attention runs (§5.2–5.4)."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CrossDiTConfig:
    """Sizes of a CrossDiT (Table 3); checked when made.

    model_dim: width d. time_dim: width of the time embedding. ff_dim: hidden width of the MLPs.
    text_blocks: blocks of the linguistic token refiner (LTF). visual_blocks: CrossDiT blocks L.
    axes_dims: channels of a head that rotate with (time, height, width); their sum is the head dim D.
    in_visual_dim, out_visual_dim: latent channels. patch_size: latent cells (t, h, w) in one token.
    visual_cond: the input also carries a condition latent and its mask.
    in_text_dim, in_text_dim2: widths of the text tokens and of the pooled text embedding.
    """

    model_dim: int
    time_dim: int
    ff_dim: int
    text_blocks: int
    visual_blocks: int
    axes_dims: tuple[int, int, int]
    in_visual_dim: int = 16
    out_visual_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    visual_cond: bool = True
    in_text_dim: int = 3584
    in_text_dim2: int = 768

    def __post_init__(self) -> None:
        if any(dim < 2 or dim % 2 for dim in self.axes_dims) or len(self.axes_dims) != 3:
            raise ValueError(f"axes_dims: expected three even positive numbers, got {self.axes_dims}")
        if self.model_dim % self.head_dim:
            raise ValueError(
                f"model_dim: expected a multiple of the head dim {self.head_dim} = sum(axes_dims), got {self.model_dim}"
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size: expected three positive numbers (t, h, w), got {self.patch_size}")

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return sum(self.axes_dims)

    @property
    def heads(self) -> int:
        """Heads of every attention, h."""
        return self.model_dim // self.head_dim

    @property
    def input_channels(self) -> int:
        """Channels of the model's input: the noisy latent, and where conditioned a second latent and its mask."""
        return 2 * self.in_visual_dim + 1 if self.visual_cond else self.in_visual_dim

    @property
    def patch_cells(self) -> int:
        """Latent cells in one token."""
        return math.prod(self.patch_size)


@dataclass(frozen=True)
class AttentionConfig:
    """Visual self-attention: dense, or NABLA (§5.4) with the probability mass kept and an optional tile window.

    thr: in (0, 1], higher is denser. sta: sliding-tile window (wT, wH, wW) in blocks, None for no union.
    """

    kind: Literal["dense", "nabla"] = "dense"
    thr: float = 0.9
    sta: tuple[int, int, int] | None = (11, 3, 3)

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "nabla"):
            raise ValueError(f'attention kind: expected "dense" or "nabla", got {self.kind!r}')
        if not 0 < self.thr <= 1:
            raise ValueError(f"thr: expected the probability mass kept, in (0, 1], got {self.thr}")
        if self.sta is not None and (len(self.sta) != 3 or min(self.sta) < 1):
            raise ValueError(f"sta: expected three positive numbers (wT, wH, wW) or None, got {self.sta}")


DENSE = AttentionConfig()
