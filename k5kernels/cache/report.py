"""What a cache did: which passes ran, which reused a residual, why, and how large the error is expected to be."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean

SCHEDULED, REUSED = "as scheduled", "residual reused"


@dataclass(frozen=True)
class CachedPass:
    """One pass of a model. run, step: from 0. computed: whether its blocks ran; reason: why.

    error: the relative error expected of its residual, from the calibration; 0 where it was computed.
    """

    run: int
    branch: str
    step: int
    computed: bool
    reason: str
    error: float = 0.0


@dataclass
class CacheReport:
    """The passes seen, in order."""

    passes: list[CachedPass] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Passes whose blocks did not run."""
        return sum(not one.computed for one in self.passes)

    @property
    def speedup(self) -> float:
        """Passes for each one computed; 1 before the first."""
        computed = len(self.passes) - self.skipped
        return len(self.passes) / computed if computed else 1.0

    @property
    def error(self) -> float:
        """The mean of the errors expected, over all passes."""
        return fmean(one.error for one in self.passes) if self.passes else 0.0

    def __str__(self) -> str:
        """A line for the whole, one a branch, one a reason why passes were computed beyond the schedule."""
        if not self.passes:
            return "cache: no pass yet"
        lines = [
            f"cache: {self.skipped} of {len(self.passes)} passes skipped ({self.speedup:.2f} passes a computed one), "
            f"expected error {self.error:.2%}"
        ]
        for branch in dict.fromkeys(one.branch for one in self.passes):
            steps = "".join("#" if one.computed else "." for one in self.passes if one.branch == branch)
            lines.append(f"  {branch}: {steps}")
        reasons = Counter(one.reason for one in self.passes if one.reason not in (SCHEDULED, REUSED))
        lines += [f"  computed, {count} passes: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)
