"""How a model's visual self-attention runs: by which engine, and what a sparse one keeps (§5.4, §7.2)."""

from dataclasses import dataclass, replace

import torch

from k5kernels.attention.engines import ENGINES, check_engine, choose_engine
from k5kernels.ops.nabla_mask import check_thr
from k5kernels.ops.sta_mask import check_window

RELEASED_WINDOW = (11, 3, 3)  # of all released models that have NABLA attention


@dataclass(frozen=True)
class AttentionConfig:
    """Self-attention of the visual tokens.

    engine: a name of `k5kernels.attention.ENGINES`, or "auto": the dense one that fits the tensors. thr: of "nabla",
    the probability mass kept, 0 to 1, higher is denser. sta: of "nabla", a sliding-tile window (w_T, w_H, w_W) in
    blocks that is kept as well; None for none.

    Raises ValueError where a value does not fit.
    """

    engine: str = "auto"
    thr: float = 0.9
    sta: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_engine(self.engine)
        check_thr(self.thr)
        if self.sta is not None:
            check_window("sta", self.sta)

    @property
    def sparse(self) -> bool:
        """Whether the engine leaves out blocks of keys, and so wants the tokens of a block to stand together."""
        return self.engine != "auto" and ENGINES[self.engine].kind == "sparse"

    def for_clip(
        self,
        height: int,
        width: int,
        seconds: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "AttentionConfig":
        """The same with the engine that `choose_engine` gives for a clip: pixels and seconds."""
        return replace(self, engine=choose_engine(height, width, seconds, device, dtype))


DENSE = AttentionConfig()
