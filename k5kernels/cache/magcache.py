"""MagCache: steps whose residual hardly changed reuse it instead of running the blocks (§7.2; arXiv 2506.09045).

The residual of a step is the blocks' output minus their input. Calibration gives, for each step, the ratio of its
magnitude to that of the step before. Where the product of the ratios since the last computed step stays near one, the
last computed residual stands in for the blocks. Which steps run follows from the ratios alone, so the whole schedule
is known before sampling begins.

Conditional and unconditional passes are separate branches, each with its own ratios, step and residual.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Blocks = Callable[[Tensor], Tensor]


class Branch(Protocol):
    """One pass of a step: blocks(x), or what stands in for it. step: from 0; the one after the last call's if None."""

    def __call__(self, blocks: Blocks, x: Tensor, step: int | None = None) -> Tensor: ...


def compute_schedule(ratios: Sequence[float], threshold: float, max_skips: int, retention: float) -> list[bool]:
    """For every step, whether its blocks run.

    ratios: one a step from the second on, so len(ratios) + 1 steps. The first step and all of the first `retention`
    (a share, 0..1) run. After them, a step is skipped while the sum of |1 - product| over the skipped steps and this
    one stays below `threshold` and no more than `max_skips` are skipped in a row.
    """
    steps = len(ratios) + 1
    # The tolerance keeps 0.2 of 35 steps at 7 in floating point.
    first_skippable = max(1, math.ceil(retention * steps - 1e-9))
    schedule = []
    product, error, skipped = 1.0, 0.0, 0
    for step in range(steps):
        computed = step < first_skippable
        if not computed:
            product *= ratios[step - 1]
            error += abs(1.0 - product)
            skipped += 1
            computed = not (error < threshold and skipped <= max_skips)
        if computed:
            product, error, skipped = 1.0, 0.0, 0
        schedule.append(computed)
    return schedule


def resample_ratios(ratios: Sequence[float], steps: int) -> list[float]:
    """The ratios for another number of steps: nearest neighbour over the steps, first on first and last on last.

    The first step, which has no ratio, counts as 1.0.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    source = [1.0, *ratios]
    if steps == 1:
        return []
    stride = (len(source) - 1) / (steps - 1)
    return [source[round(step * stride)] for step in range(1, steps)]


class MagCache:
    """Skips the visual blocks on the steps where their residual can be reused.

    ratios: for every branch, the calibrated ratio of each step from the second on. threshold: bound on the summed
    error of a run of skipped steps. max_skips: longest such run. retention: share of the steps, from the first, that
    always run. The defaults are the released models'.

    One sampling run is `reset(steps)`, then every branch called once a step. A branch that finished its steps starts
    over by itself; after an interrupted run `reset()` is needed, and the sampler always calls it. Memory: at most one
    residual a branch, kept only as long as a coming step may reuse it.

    A branch that is called on some of the steps only, as with guidance on part of them, is told which `step` each call
    is. Where the schedule counts on the residual of a step that was left out, the blocks run instead.

    Raises ValueError where the ratios are not finite, not negative numbers, as many for every branch, or a setting is
    out of range.
    """

    def __init__(
        self,
        ratios: Mapping[str, Sequence[float]],
        threshold: float = 0.12,
        max_skips: int = 2,
        retention: float = 0.2,
    ) -> None:
        _check_ratios(ratios)
        if threshold < 0 or max_skips < 0 or not 0 <= retention <= 1:
            raise ValueError(
                "expected threshold >= 0, max_skips >= 0 and retention in 0..1, "
                f"got {threshold}, {max_skips} and {retention}"
            )
        self.threshold = threshold
        self.max_skips = max_skips
        self.retention = retention
        self.steps = len(next(iter(ratios.values()))) + 1
        self._calibrated = {name: [float(ratio) for ratio in values] for name, values in ratios.items()}
        self.reset(self.steps)

    @classmethod
    def from_released(
        cls,
        mag_ratios: Sequence[float],
        steps: int,
        threshold: float = 0.12,
        max_skips: int = 2,
        retention: float = 0.2,
    ) -> "MagCache":
        """From the released flat list: conditional and unconditional ratios in turn, 2 * (calibrated steps - 1).

        Models distilled from guidance have zeros in the unconditional places: they get the branch "cond" alone.
        """
        if len(mag_ratios) % 2:
            raise ValueError(f"mag_ratios: expected an even number, cond and uncond in turn, got {len(mag_ratios)}")
        ratios = {"cond": mag_ratios[0::2]}
        if any(mag_ratios[1::2]):
            ratios["uncond"] = mag_ratios[1::2]
        cache = cls(ratios, threshold, max_skips, retention)
        cache.reset(steps)
        return cache

    def reset(self, steps: int | None = None) -> None:
        """Forget the run in progress; a new run begins, of `steps` steps (default: as many as before)."""
        self.steps = self.steps if steps is None else steps
        self.schedule = {
            name: compute_schedule(resample_ratios(ratios, self.steps), self.threshold, self.max_skips, self.retention)
            for name, ratios in self._calibrated.items()
        }
        self._step = dict.fromkeys(self._calibrated, 0)
        self._residual: dict[str, Tensor] = {}
        self._residual_step: dict[str, int] = {}

    def branch(self, name: str) -> Branch:
        """The callable (blocks, x, step=None) -> blocks(x), or x + the last residual, for one branch of this run.

        A step that is not after the last call's begins a new run of the branch. Raises ValueError where the branch has
        no ratios; the callable does where the step is not one of the run's, or x has another shape than the residual.
        """
        if name not in self._calibrated:
            raise ValueError(f"branch: no ratios for {name!r}, only for {sorted(self._calibrated)}; calibrate it")
        return partial(self._run, name)

    def _run(self, name: str, blocks: Blocks, x: Tensor, step: int | None = None) -> Tensor:
        schedule = self.schedule[name]
        if step is None:
            step = self._step[name]
        elif not 0 <= step < len(schedule):
            raise ValueError(f"step: expected 0 to {len(schedule) - 1}, as the run has steps, got {step}")
        elif step < self._step[name]:
            self._forget(name)
        reused_next = not all(schedule[step + 1 : step + 2])
        if schedule[step] or not self._has_residual_for(name, step):
            # Freed before the blocks run: two residuals never stand side by side.
            self._forget(name)
            out = blocks(x)
            if reused_next:
                self._residual[name] = (out - x).detach()
                self._residual_step[name] = step
        else:
            residual = self._residual[name]
            if residual.shape != x.shape:
                raise ValueError(
                    f"x: expected {list(residual.shape)} as in the steps before, got {list(x.shape)}; "
                    "call reset() before a new run"
                )
            out = x + residual
            if not reused_next:
                self._forget(name)
        self._step[name] = (step + 1) % len(schedule)
        return out

    def _has_residual_for(self, name: str, step: int) -> bool:
        """Whether the residual is of the step that the schedule last computes before this one, or of a later step."""
        last_computed = max(index for index in range(step) if self.schedule[name][index])
        return self._residual_step.get(name, -1) >= last_computed

    def _forget(self, name: str) -> None:
        self._residual.pop(name, None)
        self._residual_step.pop(name, None)


class MagCalibration:
    """Runs all blocks and measures the ratios for MagCache: same branches, nothing skipped.

    After a sampling run `ratios` holds, for every branch, one ratio a step from the second on: the mean over tokens of
    |residual| / |residual of the step before|, norms over the last dimension in float32.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self, steps: int | None = None) -> None:
        """Forget what was measured. steps is taken for symmetry with MagCache and not needed."""
        self.ratios: dict[str, list[float]] = {}
        self._norm: dict[str, Tensor] = {}

    def branch(self, name: str) -> Branch:
        """The callable (blocks, x, step=None) -> blocks(x) that measures one branch.

        It raises ValueError where the step given is not the next one: every ratio needs the step before.
        """
        return partial(self._run, name)

    def _run(self, name: str, blocks: Blocks, x: Tensor, step: int | None = None) -> Tensor:
        following = len(self.ratios[name]) + 1 if name in self._norm else 0
        if step not in (None, following):
            raise ValueError(f"step: expected {following}, the next one, got {step}; calibrate on every step")
        out = blocks(x)
        norm = torch.linalg.vector_norm((out - x).detach().float(), dim=-1)
        measured = self.ratios.setdefault(name, [])
        if name in self._norm:
            measured.append((norm / self._norm[name].clamp_min(1e-8)).mean().item())
        self._norm[name] = norm
        return out


def _check_ratios(ratios: Mapping[str, Sequence[float]]) -> None:
    if not ratios:
        raise ValueError("ratios: expected at least one branch, got none; measure them with MagCalibration")
    if len({len(values) for values in ratios.values()}) != 1:
        lengths = {name: len(values) for name, values in ratios.items()}
        raise ValueError(f"ratios: expected as many for every branch, got {lengths}")
    for name, values in ratios.items():
        if not all(math.isfinite(ratio) and ratio >= 0 for ratio in values):
            raise ValueError(f"ratios: expected finite numbers >= 0, branch {name!r} has others")
