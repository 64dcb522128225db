"""Time of a training step (§7.3.1), on an H100 unless another profile is given.

    step = d/d0 · S/S0 · (9 + 14 · S/S0 + 6 · d/d0) · L · B        d0 = 1792, S0 = 256 · 384 · 31

d: model dim. S: pixels, height · width · latent frames. L: CrossDiT blocks. B: batch. The report gives no unit;
milliseconds is the reading that fits (a 2B model at S0: 928 ms). The names of the terms are ours, after what
each grows with.
"""

from dataclasses import dataclass, field

from k5kernels.planner.checks import positive_integer, positive_number
from k5kernels.planner.profile import H100, HardwareProfile

REFERENCE_MODEL_DIM = 1792
REFERENCE_PIXELS = 256 * 384 * 31


@dataclass(frozen=True)
class StepTime:
    """Terms of the step time, in ms.

    tokenwise_ms: grows with S·d (norms, modulation, residuals, cross-attention to a bounded text).
    attention_ms: grows with S²·d (self-attention). linear_ms: grows with S·d² (projections and MLP).
    """

    tokenwise_ms: float = field(metadata={"formula": "9 · d/d0 · S/S0 · L · B"})
    attention_ms: float = field(metadata={"formula": "14 · d/d0 · (S/S0)² · L · B"})
    linear_ms: float = field(metadata={"formula": "6 · (d/d0)² · S/S0 · L · B"})

    @property
    def total_ms(self) -> float:
        """The step, in ms."""
        return self.tokenwise_ms + self.attention_ms + self.linear_ms


def step_time_terms(
    model_dim: int, pixels: float, blocks: int, batch: float, profile: HardwareProfile = H100
) -> StepTime:
    """Terms of the step time.

    model_dim: d. pixels: S = height · width · latent frames of one clip. blocks: L. batch: B, clips on a GPU.
    profile: the GPU, whose coefficients stand for the report's 9, 14 and 6.
    Raises ValueError where one is not positive, or model_dim or blocks is not an integer.
    """
    d, s = positive_integer("model_dim", model_dim), positive_number("pixels", pixels)
    d0, s0 = REFERENCE_MODEL_DIM, REFERENCE_PIXELS
    work = d * s * positive_integer("blocks", blocks) * positive_number("batch", batch)
    # Integers are multiplied out before the one division, so that each term is exact to its last digit.
    return StepTime(
        tokenwise_ms=profile.tokenwise_ms * work / (d0 * s0),
        attention_ms=profile.attention_ms * work * s / (d0 * s0**2),
        linear_ms=profile.linear_ms * work * d / (d0**2 * s0),
    )


def step_time_ms(model_dim: int, pixels: float, blocks: int, batch: float, profile: HardwareProfile = H100) -> float:
    """The step, in ms; arguments and errors as in `step_time_terms`."""
    return step_time_terms(model_dim, pixels, blocks, batch, profile).total_ms
