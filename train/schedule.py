"""How long a training is and how its learning rates move (§6.3.2)."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, constant, then linear to zero over the last `decay_steps` of `steps`.

    max_grad_norm: gradients are scaled down to this L2 norm, taken over all parameters; None leaves them.
    seed: of every draw.
    """

    steps: int
    warmup_steps: int = 100
    decay_steps: int = 0
    max_grad_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the steps that are done. Without a decay, going on to more steps changes none of them."""
        settings = asdict(self)
        if not self.decay_steps:
            del settings["steps"]
        return settings

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        up = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        down = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return min(up, 1.0, down)
