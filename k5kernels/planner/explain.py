"""Why the best layout of a search is best, and why the obvious others lose, in words with figures."""

from dataclasses import dataclass, fields, replace
from typing import Any

from k5kernels.planner.candidates import with_nearest_accumulation
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.search import (
    DOES_NOT_FIT_WORDS,
    GIB,
    NothingFitsError,
    Plan,
    SearchResult,
    evaluate,
    largest_term,
    search,
    why_not,
)
from k5kernels.planner.values import term_words

REPORT_SHARDS, REPORT_SEQUENCE_PARALLEL = 64, 8  # §6.1.3
SMALLEST_CHANGE = 5e-4  # what prints as 0.0% is not told
# The terms that differ from layout to layout for the same clip, in words.
WAITS = {
    "sequence_collectives": "sequence collectives",
    "shard_collectives": "shard collectives",
    "replica_collectives": "replica collectives",
    "offload": "offload",
    "text_encoder": "text encoder",
}
TERMS_THAT_COST = {"no_recomputation": "recomputation", **WAITS}  # where that saving goes, recomputation costs


@dataclass(frozen=True)
class Alternative:
    """The best layout of those that `name` tells. plan: None where none is possible; layout is then the best of all
    with that one change.
    """

    name: str
    layout: ClusterLayout
    plan: Plan | None
    verdict: str


def why_best(result: SearchResult) -> str:
    """Where the time and the memory of the best layout go."""
    best, limit = result.best, result.problem.memory_bytes
    step, memory = best.step, best.memory
    waits = {words: getattr(step, f"{name}_ms") for name, words in WAITS.items()}
    spent = [f"{name} {ms / step.total_ms:.1%}" for name, ms in waits.items() if ms > SMALLEST_CHANGE * step.total_ms]
    name, largest = largest_term(memory)
    return (
        f"{step.computation_ms / step.total_ms:.1%} of a step of {step.total_ms / 1e3:,.2f} s is computation"
        f"{', ' + ', '.join(spent) if spent else ''}; {memory.total_bytes / GIB:.1f} of {limit / GIB:.1f} GiB, "
        f"most of it {name} ({largest / GIB:.1f} GiB)"
    )


def alternatives(result: SearchResult) -> list[Alternative]:
    """The obvious other choices: the best layout that has each of them, and why it is not the best of all."""
    found = []
    for name, changed, fixed in _choices(result):
        problem = replace(result.problem, fixed={**result.problem.fixed, **fixed})
        try:
            plan = search(problem, result.goal, keep=1).best
        except NothingFitsError:
            layout = with_nearest_accumulation(result.problem, changed)
            found.append(Alternative(name, layout, None, _refusal(result, layout)))
        else:
            found.append(Alternative(name, plan.layout, plan, _comparison(result, plan)))
    return found


def _choices(result: SearchResult) -> list[tuple[str, ClusterLayout, dict[str, list[Any]]]]:
    """(name, the best layout with that one change, the axes held) of every choice that the best did not make."""
    best, node = result.best.layout, result.problem.profile.gpus_per_node
    choices: list[tuple[str, dict[str, list[Any]]]] = [
        (f"SP {sp}", {"sequence_parallel": [sp]}) for sp in (1, REPORT_SEQUENCE_PARALLEL)
    ]
    choices += [("offload", {"checkpointing": [True], "offload": [True]})]
    choices += [("checkpointing, no offload", {"checkpointing": [True], "offload": [False]})]
    choices += [("no checkpointing", {"checkpointing": [False], "offload": [False]})]
    choices += [(f"{shards} shards", {"shards": [shards]}) for shards in dict.fromkeys((node, REPORT_SHARDS))]
    choices += [("one set of shards", {"shards": [best.gpus], "replicas": [1]})]
    choices += [(f"micro-batch {best.micro_batch * 2}", {"micro_batch": [best.micro_batch * 2]})]
    if best.micro_batch > 1:
        choices += [("micro-batch 1", {"micro_batch": [1]})]
    described = [
        (name, replace(best, **{axis: values[0] for axis, values in held.items()}), held) for name, held in choices
    ]
    allowed = result.problem.fixed
    return [
        (name, layout, held)
        for name, layout, held in described
        if layout != best and all(values[0] in allowed.get(axis, values) for axis, values in held.items())
    ]


def _refusal(result: SearchResult, layout: ClusterLayout) -> str:
    """Why a layout cannot be, or the term of its memory that grew most over the best's."""
    reason = why_not(result.problem, layout)
    if reason is None or not reason.startswith(DOES_NOT_FIT_WORDS):
        return reason or "no layout with it is possible"
    memory, best = evaluate(result.problem, layout).memory, result.best.memory
    name = max((term.name for term in fields(memory)), key=lambda term: getattr(memory, term) - getattr(best, term))
    total, limit = memory.total_bytes / GIB, result.problem.memory_bytes / GIB
    words, now, before = term_words(name), getattr(memory, name), getattr(best, name)
    grown = f"{words} {now / GIB:.1f} GiB instead of {before / GIB:.1f}"
    return f"{DOES_NOT_FIT_WORDS}: {total:.1f} of {limit:.1f} GiB, {grown}"


def _comparison(result: SearchResult, plan: Plan) -> str:
    """How a plan that fits differs from the best, and the term that grew most."""
    best = result.best
    figures = {"GPU-hours": plan.gpu_hours / best.gpu_hours - 1, "wall time": plan.wall_hours / best.wall_hours - 1}
    differing = [f"{change:+.1%} {name}" for name, change in figures.items() if abs(change) >= SMALLEST_CHANGE]
    if plan.layout.gpus != best.layout.gpus:
        differing.append(f"{plan.layout.gpus - best.layout.gpus:+d} GPUs")
    words = differing or ["the same time"]
    used = f"{plan.memory.total_bytes / GIB:.1f} GiB instead of {best.memory.total_bytes / GIB:.1f}"
    return ", ".join(["fits: " + words[0], *words[1:], *_most_grown_term(best, plan), used])


def _most_grown_term(best: Plan, plan: Plan) -> list[str]:
    """The term of the step that costs most more than in the best, in GPU-ms for one clip."""
    growth = {
        name: (
            getattr(plan.step, f"{name}_ms") * plan.layout.gpus / plan.layout.batch
            - getattr(best.step, f"{name}_ms") * best.layout.gpus / best.layout.batch
        )
        for name in TERMS_THAT_COST
    }
    name = max(growth, key=lambda term: growth[term])
    if growth[name] < SMALLEST_CHANGE * best.step.total_ms * best.layout.gpus / best.layout.batch:
        return []
    return [f"{TERMS_THAT_COST[name]} {growth[name]:+,.0f} GPU-ms a clip"]
