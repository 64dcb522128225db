"""What an accelerated run did: how dense its attention was, and where it ran as before."""

from collections import defaultdict
from statistics import fmean

DENSE_STEPS = "one of the first steps, which were asked to be dense"


class Report:
    """Calls of self-attention: the density of the block mask by layer and step, and reasons where there was none.

    densities: layer -> step -> means over heads and samples, one for each pass of the model; empty where densities
    were not asked for, and in compiled code. unchanged: reason -> number of calls that ran as they would have without
    us. engines: engine -> number of calls.
    """

    def __init__(self) -> None:
        self.densities: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.unchanged: dict[str, int] = defaultdict(int)
        self.engines: dict[str, int] = defaultdict(int)

    @property
    def density(self) -> float | None:
        """The mean over all layers, steps and passes; None where none is known."""
        found = [one for layer in self.densities.values() for passes in layer.values() for one in passes]
        return fmean(found) if found else None

    def __str__(self) -> str:
        """A line for each thing to say."""
        lines = [f"attention by {engine}: {count} calls" for engine, count in self.engines.items()]
        if self.density is not None:
            by_layer = [fmean(one for passes in steps.values() for one in passes) for steps in self.densities.values()]
            lines.append(
                f"density {self.density:.1%} (of layers {min(by_layer):.1%} to {max(by_layer):.1%}, "
                f"{len(by_layer)} layers)"
            )
        lines += [f"as before: {count} calls, {reason}" for reason, count in self.unchanged.items()]
        return "\n".join(lines) or "no call of self-attention yet"
