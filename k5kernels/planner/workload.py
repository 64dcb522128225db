"""What is trained: a model on a mix of clips."""

from dataclasses import dataclass

from k5kernels.planner.checks import positive_integer, positive_number, share
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import ClipShape, ModelShape
from k5kernels.planner.step import step_time_terms


@dataclass(frozen=True)
class Workload:
    """What is trained: a model on a mix of clips, so many steps of so many clips.

    clips: (size, weight) of each; weights are normalised, since some rows of Table 4 do not sum to 1.
    batch: clips of an optimizer step, over all GPUs. nabla_thr: of NABLA, None for full attention.
    Raises ValueError that names the field where one cannot be.
    """

    model: ModelShape
    clips: tuple[tuple[ClipShape, float], ...]
    batch: int
    steps: int = 1
    nabla_thr: float | None = None

    def __post_init__(self) -> None:
        positive_integer("batch", self.batch)
        positive_integer("steps", self.steps)
        if self.nabla_thr is not None:
            share("nabla_thr", self.nabla_thr)
        if not self.clips:
            raise ValueError("clips: expected at least one size, got none")
        for _, weight in self.clips:
            positive_number("weight of a clip", weight)

    @property
    def largest_tokens(self) -> int:
        """Visual tokens of the largest clip: it decides what fits."""
        return max(clip.tokens for clip, _ in self.clips)

    @property
    def mean_tokens(self) -> float:
        """Visual tokens of a clip, mean over the mix."""
        return self._mean([clip.tokens for clip, _ in self.clips])

    def clip_time_ms(self, profile: HardwareProfile = H100) -> tuple[float, float]:
        """(attention, all else) of one clip on one GPU in ms, mean over the mix, full attention."""
        terms = [step_time_terms(self.model.model_dim, c.pixels, self.model.blocks, 1, profile) for c, _ in self.clips]
        return (
            self._mean([term.attention_ms for term in terms]),
            self._mean([term.tokenwise_ms + term.linear_ms for term in terms]),
        )

    def _mean(self, values: list[float] | list[int]) -> float:
        weights = [weight for _, weight in self.clips]
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
