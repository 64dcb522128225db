"""The best layout for a workload: every candidate is computed, what cannot be is dropped, the rest is ranked."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k5kernels.planner.candidates import AXES, DOES_NOT_FIT, RULES, Problem, broken_rule, candidates
from k5kernels.planner.checks import one_of, positive_integer
from k5kernels.planner.cluster_layout import AnyLayout, ClusterLayout, ClusterLayouts
from k5kernels.planner.layout_step import LayoutStepTime, layout_step_time
from k5kernels.planner.memory import Memory, layout_memory
from k5kernels.planner.stages import MS_PER_HOUR
from k5kernels.planner.values import term_words

GIB = 2**30
GOALS = ("gpu-hours", "wall-time", "gpus")
DOES_NOT_FIT_WORDS = "does not fit"
SIGNIFICANT_DIGITS = 9  # beyond them two figures are the same and the next criterion decides


class NothingFitsError(ValueError):
    """No candidate is possible; the message says which rule dropped how many and how much memory was missing."""


@dataclass(frozen=True)
class Plan:
    """A layout and what it takes. gpu_hours and wall_hours are for all clips of the workload, batch × steps."""

    layout: ClusterLayout
    step: LayoutStepTime[float]
    memory: Memory[float]
    gpu_hours: float
    wall_hours: float


@dataclass(frozen=True)
class SearchResult:
    """Ranked answer of a search.

    ranked: the best plans, best first. pareto: no plan has both fewer GPU-hours and less wall time than one of these;
    by wall time. candidates: layouts looked at. dropped: how many each rule dropped, the first that held.
    """

    problem: Problem
    goal: str
    ranked: tuple[Plan, ...]
    pareto: tuple[Plan, ...]
    candidates: int
    dropped: dict[str, int]

    @property
    def best(self) -> Plan:
        """The first of the ranked."""
        return self.ranked[0]

    @property
    def possible(self) -> int:
        """Candidates that were not dropped."""
        return self.candidates - sum(self.dropped.values())


def evaluate(problem: Problem, layout: ClusterLayout) -> Plan:
    """What one layout takes, whether it fits or not."""
    step = layout_step_time(problem.workload, layout, problem.extensions, problem.profile)
    memory = layout_memory(problem.workload, layout, problem.extensions, problem.profile)
    wall = float(_wall_hours(problem, layout, step.total_ms))
    return Plan(layout, step, memory, gpu_hours=wall * layout.gpus, wall_hours=wall)


def why_not(problem: Problem, layout: ClusterLayout) -> str | None:
    """In words, why the layout cannot be or does not fit; None where it can."""
    if (words := broken_rule(problem, layout)) is not None:
        return f"cannot be: {words}"
    memory = evaluate(problem, layout).memory
    if memory.total_bytes > problem.memory_bytes:
        name, largest = largest_term(memory)
        total, limit = memory.total_bytes / GIB, problem.memory_bytes / GIB
        return f"{DOES_NOT_FIT_WORDS}: {total:.1f} of {limit:.1f} GiB, {name} {largest / GIB:.1f} GiB"
    return None


def largest_term(memory: Memory[float]) -> tuple[str, float]:
    """(name in words, bytes) of the largest term."""
    name = max((field.name for field in fields(memory)), key=lambda field: getattr(memory, field))
    return term_words(name), getattr(memory, name)


def search(problem: Problem, goal: str = "gpu-hours", keep: int = 10) -> SearchResult:
    """The best layouts.

    goal: "gpu-hours" (the fewest; then the shortest), "wall-time" (the shortest; then the fewest GPU-hours) or "gpus"
    (the fewest; then the fewest GPU-hours); among equals the one with least memory. keep: how many to return.
    Raises ValueError where the goal is unknown, NothingFitsError where no layout is possible.
    """
    one_of("goal", goal, GOALS)
    positive_integer("keep", keep)
    layouts = candidates(problem)
    allowed, dropped = _apply_rules(problem, layouts)
    layouts = layouts.select(allowed)
    memory = layout_memory(problem.workload, layouts, problem.extensions, problem.profile).total_bytes
    fits = memory <= problem.memory_bytes
    dropped[DOES_NOT_FIT] = int(np.count_nonzero(~fits))
    if not fits.any():
        raise NothingFitsError(_nothing_fits(problem, layouts, memory, dropped))
    layouts, memory = layouts.select(fits), memory[fits]
    step = layout_step_time(problem.workload, layouts, problem.extensions, problem.profile).total_ms
    wall = _wall_hours(problem, layouts, step)
    gpu_hours = wall * layouts.gpus
    order = _order(goal, gpu_hours, wall, layouts.gpus, memory)

    def plans(indices: NDArray) -> tuple[Plan, ...]:
        return tuple(evaluate(problem, layouts[index]) for index in indices)

    return SearchResult(problem, goal, plans(order[:keep]), plans(_front(gpu_hours, wall)), len(allowed), dropped)


def _apply_rules(problem: Problem, layouts: ClusterLayouts) -> tuple[NDArray, dict[str, int]]:
    """(mask of the layouts that no rule drops, how many each rule was the first to drop)."""
    allowed = np.ones(len(layouts), dtype=bool)
    dropped = {}
    for rule in RULES:
        broken = rule.broken(problem, layouts) & allowed
        dropped[rule.name] = int(np.count_nonzero(broken))
        allowed &= ~broken
    return allowed, dropped


def _wall_hours(problem: Problem, layout: AnyLayout, step_ms: Any) -> Any:
    """Hours for batch × steps clips, however many clips the layout takes a step."""
    clips = problem.workload.batch * problem.workload.steps
    return step_ms * (clips / layout.batch) / MS_PER_HOUR


def _order(goal: str, gpu_hours: NDArray, wall: NDArray, gpus: NDArray, memory: NDArray) -> NDArray:
    """Indices, best first."""
    hours, time = _rounded(gpu_hours), _rounded(wall)
    criteria = {"gpu-hours": (hours, time), "wall-time": (time, hours), "gpus": (gpus, hours)}[goal]
    return np.lexsort([_rounded(memory), *reversed(criteria)])


def _rounded(values: NDArray) -> NDArray:
    """Values cut to SIGNIFICANT_DIGITS, so that rounding errors do not rank."""
    scale = 10.0 ** (SIGNIFICANT_DIGITS - np.ceil(np.log10(values)))
    return np.rint(values * scale) / scale


def _front(gpu_hours: NDArray, wall: NDArray) -> NDArray:
    """Indices of the Pareto front, by wall time."""
    hours = _rounded(gpu_hours)
    order = np.lexsort([hours, _rounded(wall)])
    fewest_before = np.minimum.accumulate(np.concatenate([[np.inf], hours[order][:-1]]))
    return order[hours[order] < fewest_before]


def _nothing_fits(problem: Problem, layouts: ClusterLayouts, memory: NDArray, dropped: dict[str, int]) -> str:
    counts = ", ".join(f"{name}: {count:,}" for name, count in dropped.items() if count)
    if not memory.size:
        fixed = f" (fixed: {', '.join(name for name in AXES if name in problem.fixed)})" if problem.fixed else ""
        return f"no layout is possible on {problem.gpus} GPUs{fixed}; dropped: {counts}"
    least = layouts[int(memory.argmin())]
    return (
        f"no layout is possible on {problem.gpus} GPUs; nearest: {least}, {why_not(problem, least)}; dropped: {counts}"
    )
