"""The layouts that a search looks at, and the rules that drop one before its memory is looked at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k5kernels.planner.checks import positive_integer, positive_number, share, switch
from k5kernels.planner.cluster_layout import AnyLayout, ClusterLayout, ClusterLayouts
from k5kernels.planner.extensions import FULL, Extensions
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.workload import Workload

MOST_CANDIDATES = 5_000_000
MOST_GPUS, MOST_BATCH = 2**20, 2**40  # products of the axes stay within 64 bits


@dataclass(frozen=True)
class Problem:
    """What a search is given.

    gpus: at most. memory_bytes: of each. batch_tolerance: by what share the clips of a step may differ from the
    workload's batch, in which the batches of Table 4 seldom leave a choice: 1331 = 11³. extensions: terms beside the
    report's. fixed: axes of the search held at the values given, such as {"sequence_parallel": [8]}.
    Raises ValueError that names the field where one cannot be.
    """

    workload: Workload
    gpus: int
    memory_bytes: float
    batch_tolerance: float = 0.05
    extensions: Extensions = FULL
    profile: HardwareProfile = H100
    fixed: dict[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive_integer("gpus", self.gpus, MOST_GPUS)
        positive_integer("batch", self.workload.batch, MOST_BATCH)
        positive_number("memory_bytes", self.memory_bytes)
        share("batch_tolerance", self.batch_tolerance)
        if unknown := sorted(self.fixed.keys() - set(AXES)):
            raise ValueError(f"fixed: expected some of {', '.join(AXES)}, got {', '.join(unknown)}")
        for name, values in self.fixed.items():
            _check_axis(name, values)


AXES = ("shards", "replicas", "sequence_parallel", "micro_batch", "checkpointing", "offload")


def _check_axis(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name}: expected at least one value, got none")
    for value in values:
        if name in ("checkpointing", "offload"):
            switch(name, value)
        else:
            positive_integer(name, value)


def axes(problem: Problem) -> dict[str, NDArray]:
    """The values of every axis: powers of two and three times them, divisors of `gpus`, all SP of a node."""
    counts = sorted({*_round_numbers(problem.gpus), *(n for n in range(1, problem.gpus + 1) if problem.gpus % n == 0)})
    values: dict[str, Sequence[Any]] = {
        "shards": counts,
        "replicas": counts,
        "sequence_parallel": range(1, min(problem.gpus, problem.profile.gpus_per_node) + 1),
        "micro_batch": _round_numbers(problem.workload.batch),
        "checkpointing": (True, False),
        "offload": (False, True),
    }
    return {name: np.array(problem.fixed.get(name, values[name])) for name in AXES}


def _round_numbers(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … up to the largest."""
    powers = [2**i for i in range(largest.bit_length())]
    return sorted({n for power in powers for n in (power, 3 * power) if n <= largest})


def candidates(problem: Problem) -> ClusterLayouts:
    """All combinations of the axes. Accumulation is what comes nearest to the batch.

    Raises ValueError where they are more than MOST_CANDIDATES.
    """
    values = axes(problem)
    # Pairs are cut to the GPUs there are before the other axes multiply them.
    shards, replicas = (grid.ravel() for grid in np.meshgrid(values["shards"], values["replicas"], indexing="ij"))
    pairs = np.flatnonzero(shards * replicas <= problem.gpus)
    sizes = [len(pairs), *(len(values[name]) for name in AXES[2:])]
    if (count := int(np.prod(sizes, dtype=np.float64))) > MOST_CANDIDATES:
        raise ValueError(f"gpus: {count:,} layouts, expected at most {MOST_CANDIDATES:,}; hold some axes fixed")
    pair, *rest = (grid.ravel() for grid in np.meshgrid(pairs, *(values[name] for name in AXES[2:]), indexing="ij"))
    fields = {"shards": shards[pair], "replicas": replicas[pair]} | dict(zip(AXES[2:], rest, strict=True))
    layouts = ClusterLayouts(**fields, accumulation=np.ones(len(pair), np.int64))
    return replace(layouts, accumulation=_nearest_accumulation(problem, layouts))


def with_nearest_accumulation(problem: Problem, layout: ClusterLayout) -> ClusterLayout:
    """The layout with the accumulation whose batch comes nearest to the workload's."""
    return replace(layout, accumulation=int(_nearest_accumulation(problem, layout)))


def _nearest_accumulation(problem: Problem, layout: AnyLayout) -> NDArray[np.int64]:
    clips = layout.micro_batch * np.maximum(1, layout.groups)  # of one forward of all groups
    return np.maximum(1, np.rint(problem.workload.batch / clips)).astype(np.int64)


@dataclass(frozen=True)
class Rule:
    """Why a layout is impossible.

    broken: a bool for one layout, an array [n] for n of them. words: for one layout, with its figures.
    """

    name: str
    broken: Callable[[Problem, AnyLayout], Any]
    words: Callable[[Problem, ClusterLayout], str]


def _batch_is_off(problem: Problem, layout: AnyLayout) -> Any:
    wanted = problem.workload.batch
    return np.abs(layout.batch - wanted) > problem.batch_tolerance * wanted


RULES = (
    Rule(
        "more GPUs than there are",
        lambda problem, layout: layout.gpus > problem.gpus,
        lambda problem, layout: f"{layout.gpus} GPUs of {problem.gpus}",
    ),
    Rule(
        "a part of a node beside whole ones",
        lambda problem, layout: (
            (layout.gpus > problem.profile.gpus_per_node) & (layout.gpus % problem.profile.gpus_per_node != 0)
        ),
        lambda problem, layout: f"{layout.gpus} GPUs are not whole nodes of {problem.profile.gpus_per_node}",
    ),
    Rule(
        "SP does not divide the heads",
        lambda problem, layout: problem.workload.model.heads % layout.sequence_parallel != 0,
        lambda problem, layout: f"SP {layout.sequence_parallel} does not divide {problem.workload.model.heads} heads",
    ),
    Rule(
        "SP does not stay in a node",
        lambda problem, layout: (
            (layout.sequence_parallel > problem.profile.gpus_per_node)
            | (
                (layout.gpus > problem.profile.gpus_per_node)
                & (problem.profile.gpus_per_node % layout.sequence_parallel != 0)
            )
        ),
        lambda problem, layout: (
            f"SP {layout.sequence_parallel} crosses the border of a node of {problem.profile.gpus_per_node} GPUs"
        ),
    ),
    Rule(
        "SP does not divide the GPUs",
        lambda problem, layout: layout.gpus % layout.sequence_parallel != 0,
        lambda problem, layout: f"SP {layout.sequence_parallel} does not divide {layout.gpus} GPUs",
    ),
    Rule(
        "no accumulation comes near the batch",
        _batch_is_off,
        lambda problem, layout: (
            f"micro-batch {layout.micro_batch} × {layout.groups} groups × accumulation {layout.accumulation} = "
            f"{layout.batch} clips, over {problem.batch_tolerance:.1%} off the batch of {problem.workload.batch}"
        ),
    ),
    Rule(
        "offload without checkpointing",
        lambda problem, layout: layout.offload & np.logical_not(layout.checkpointing),
        lambda problem, layout: "offload moves block inputs, which are kept only with checkpointing",
    ),
)
DOES_NOT_FIT = "does not fit in memory"


def broken_rule(problem: Problem, layout: ClusterLayout) -> str | None:
    """In words, the first rule that one layout breaks; None where it keeps to all."""
    return next((rule.words(problem, layout) for rule in RULES if rule.broken(problem, layout)), None)
