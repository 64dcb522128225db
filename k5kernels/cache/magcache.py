"""MagCache: steps whose residual hardly changed reuse it instead of running the blocks (§7.2; arXiv 2506.09045).

The residual of a step is the blocks' output minus their input. Calibration gives, for each step, the ratio of its
magnitude to that of the step before. Where the product of the ratios since the last computed step stays near one, the
last computed residual stands in for the blocks. Which steps run follows from the ratios alone, so the whole schedule
is known before sampling begins.

Conditional and unconditional passes are separate branches, each with its own ratios, step and residual.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from k5kernels.cache.schedule import compute_schedule, resample_ratios, reuse_errors, threshold_for

Blocks = Callable[[Tensor], Tensor]
Residual = tuple[Tensor | None, ...]


class Branch(Protocol):
    """One pass of a step: blocks(x), or what stands in for it. step: from 0; the one after the last call's if None."""

    def __call__(self, blocks: Blocks, x: Tensor, step: int | None = None) -> Tensor: ...


class Policy(Protocol):
    """Decides which passes run, and keeps what stands in for the others. It knows no model."""

    def reset(self, steps: int | None = None) -> None:
        """A new run begins."""

    def decide(self, branch: str, step: int) -> bool:
        """Whether the blocks run on this pass; where not, `reuse` has what stands in for them."""

    def record(self, branch: str, step: int, residual: Residual) -> None:
        """Takes the residual of a pass whose blocks ran: of each tensor that they give, what they added to it."""

    def reuse(self, branch: str, step: int) -> Residual:
        """What stands in for the residual of a pass whose blocks do not run."""

    def free(self) -> None:
        """Lets go of all residuals; no further pass of this run is coming."""


class MagCache:
    """Skips the visual blocks on the steps where their residual can be reused.

    ratios: for every branch, the calibrated ratio of each step from the second on. threshold: bound on the summed
    error of a run of skipped steps. max_skips: longest such run. retention: share of the steps, from the first, that
    always run, as the last one does. The defaults are the released models'. extrapolate: 0 reuses the last residual as
    it is; w above 0 also goes w times as far as the change between the last two computed ones leads, 1 in full, but no
    more steps ahead than lie between those two: what two neighbours differ by says little of three steps later.
    together: whether all branches run on the same steps, by the mean of their ratios; they then err alike, and their
    difference, which guidance takes, errs less.

    As a policy (`decide`, `record`, `reuse`) it is told what runs and asks for no model. As a cache of a sampler of
    one's own it is `reset(steps)`, then every `branch` called once a step. A branch that finished its steps starts
    over by itself; after an interrupted run `reset()` is needed, and the sampler always calls it. Memory: at most one
    residual a branch, two where it extrapolates, each kept only as long as a coming step may use it.

    A branch that is called on some of the steps only, as with guidance on part of them, is told which `step` each call
    is. Where the schedule counts on the residual of a step that was left out, the blocks run instead. A branch or a
    step that the ratios do not have is always computed.

    Raises ValueError where the ratios are not finite, not negative numbers, as many for every branch, or a setting is
    out of range.
    """

    def __init__(
        self,
        ratios: Mapping[str, Sequence[float]],
        threshold: float = 0.12,
        max_skips: int = 2,
        retention: float = 0.2,
        extrapolate: float = 0.0,
        together: bool = False,
    ) -> None:
        _check_ratios(ratios)
        if not 0 <= extrapolate <= 1:
            raise ValueError(f"extrapolate: expected 0 to 1, got {extrapolate}")
        if threshold < 0 or max_skips < 0 or not 0 <= retention <= 1:
            raise ValueError(
                "expected threshold >= 0, max_skips >= 0 and retention in 0..1, "
                f"got {threshold}, {max_skips} and {retention}"
            )
        self.threshold = threshold
        self.max_skips = max_skips
        self.retention = retention
        self.extrapolate = extrapolate
        self.together = together
        self.steps = len(next(iter(ratios.values()))) + 1
        self._calibrated = {name: [float(ratio) for ratio in values] for name, values in ratios.items()}
        self._target: dict[str, float] | None = None
        self.reset(self.steps)

    @classmethod
    def from_released(
        cls,
        mag_ratios: Sequence[float],
        steps: int,
        threshold: float = 0.12,
        max_skips: int = 2,
        retention: float = 0.2,
        extrapolate: float = 0.0,
        together: bool = False,
    ) -> "MagCache":
        """From the released flat list: conditional and unconditional ratios in turn, 2 * (calibrated steps - 1).

        Models distilled from guidance have zeros in the unconditional places: they get the branch "cond" alone.
        """
        if len(mag_ratios) % 2:
            raise ValueError(f"mag_ratios: expected an even number, cond and uncond in turn, got {len(mag_ratios)}")
        ratios = {"cond": mag_ratios[0::2]}
        if any(mag_ratios[1::2]):
            ratios["uncond"] = mag_ratios[1::2]
        cache = cls(ratios, threshold, max_skips, retention, extrapolate, together)
        cache.reset(steps)
        return cache

    @classmethod
    def for_target(
        cls,
        ratios: Mapping[str, Sequence[float]],
        *,
        error: float | None = None,
        speedup: float | None = None,
        max_skips: int = 2,
        retention: float = 0.2,
        extrapolate: float = 0.0,
        together: bool = False,
    ) -> "MagCache":
        """With the threshold that reaches a target, chosen from the ratios anew for each number of steps.

        error: the largest mean, over all passes, of what `reuse_errors` expects. speedup: passes for each computed
        one, at least. Raises ValueError where both or neither are given, or the target is out of reach.
        """
        cache = cls(ratios, 0.0, max_skips, retention, extrapolate, together)
        target = {"error": error, "speedup": speedup}
        cache._target = {name: value for name, value in target.items() if value is not None}
        cache.reset()
        return cache

    def reset(self, steps: int | None = None) -> None:
        """Forget the run in progress; a new run begins, of `steps` steps (default: as many as before)."""
        self.steps = self.steps if steps is None else steps
        ratios = {name: resample_ratios(values, self.steps) for name, values in self._calibrated.items()}
        planned = _mean_for_all(ratios) if self.together else ratios
        if self._target is not None:
            self.threshold = threshold_for(planned, self.max_skips, self.retention, **self._target)
        self.schedule = {
            name: compute_schedule(values, self.threshold, self.max_skips, self.retention)
            for name, values in planned.items()
        }
        self.errors = {name: reuse_errors(values, self.schedule[name]) for name, values in ratios.items()}
        self._step = dict.fromkeys(self._calibrated, 0)
        self._kept: dict[str, list[_Kept]] = {name: [] for name in self._calibrated}

    def decide(self, branch: str, step: int) -> bool:
        """Whether the blocks run on this step of the branch. Where they do, what no step will use is freed first."""
        schedule = self.schedule.get(branch, ())
        if 0 <= step < len(schedule) and not schedule[step] and self._has_residual_for(branch, step):
            return False
        if branch in self._kept:
            # Freed before the blocks run: no more residuals than needed ever stand side by side.
            self._free(branch, step + 1, newer=1)
        return True

    def record(self, branch: str, step: int, residual: Residual) -> None:
        """Keeps the residual where a coming step may use it."""
        if branch in self._kept:
            self._kept[branch].append(_Kept(step, residual))
            self._free(branch, step + 1)

    def reuse(self, branch: str, step: int) -> Residual:
        """The last residual, extrapolated to this step; freed where no further step uses it."""
        residual = self._residual_at(branch, step)
        self._free(branch, step + 1)
        return residual

    def free(self) -> None:
        """Lets go of all residuals."""
        for kept in self._kept.values():
            kept.clear()

    @classmethod
    def load(cls, path: Path | str, **settings: Any) -> "MagCache":
        """From a file that `MagCalibration.save` wrote; settings as of the class."""
        return cls(json.loads(Path(path).read_text())["ratios"], **settings)

    def branch(self, name: str) -> Branch:
        """The callable (blocks, x, step=None) -> blocks(x), or x + the last residual, for one branch of this run.

        A step that is not after the last call's begins a new run of the branch. Raises ValueError where the branch has
        no ratios; the callable does where the step is not one of the run's, or x has another shape than the residual.
        """
        if name not in self._calibrated:
            raise ValueError(f"branch: no ratios for {name!r}, only for {sorted(self._calibrated)}; calibrate it")
        return partial(self._run, name)

    def _run(self, name: str, blocks: Blocks, x: Tensor, step: int | None = None) -> Tensor:
        steps = len(self.schedule[name])
        if step is None:
            step = self._step[name]
        elif not 0 <= step < steps:
            raise ValueError(f"step: expected 0 to {steps - 1}, as the run has steps, got {step}")
        elif step < self._step[name]:
            self._forget(name)
        if self.decide(name, step):
            out = blocks(x)
            self.record(name, step, ((out - x).detach(),))
        else:
            (kept,) = self._kept[name][-1].residual
            assert kept is not None
            if kept.shape != x.shape:
                raise ValueError(
                    f"x: expected {list(kept.shape)} as in the steps before, got {list(x.shape)}; "
                    "call reset() before a new run"
                )
            (residual,) = self.reuse(name, step)
            assert residual is not None
            out = x + residual
        self._step[name] = (step + 1) % steps
        return out

    def _has_residual_for(self, name: str, step: int) -> bool:
        """Whether the residual is of the step that the schedule last computes before this one, or of a later step."""
        last_computed = max(index for index in range(step) if self.schedule[name][index])
        kept = self._kept[name]
        return bool(kept) and last_computed <= kept[-1].step < step

    def _residual_at(self, name: str, step: int) -> Residual:
        """The last residual, moved on along the change since the one before it, once that change at most."""
        *earlier, last = self._kept[name]
        if not earlier:
            return last.residual
        before = earlier[-1]
        weight = self.extrapolate * min(1.0, (step - last.step) / (last.step - before.step))
        return tuple(
            now if now is None or then is None else torch.lerp(now, then, -weight)
            for now, then in zip(last.residual, before.residual, strict=True)
        )

    def _free(self, name: str, coming: int, newer: int = 0) -> None:
        """Drops the residuals that no step from `coming` on will use, with `newer` ones to be recorded before it."""
        schedule, order = self.schedule[name][coming:], 1 if self.extrapolate else 0

        def used(age: int) -> bool:
            """A residual is used until `order` newer ones stand before it and one more takes its place."""
            for runs in schedule:
                if age > order or not runs:
                    return age <= order
                age += 1
            return False

        kept = self._kept[name]
        ages = range(len(kept) - 1 + newer, newer - 1, -1)
        kept[:] = [residual for age, residual in zip(ages, kept, strict=True) if used(age)]

    def _forget(self, name: str) -> None:
        self._kept[name].clear()


def _mean_for_all(ratios: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The mean of the branches, step by step, for every branch."""
    mean = [fmean(step) for step in zip(*ratios.values(), strict=True)]
    return dict.fromkeys(ratios, mean)


class _Kept(NamedTuple):
    step: int
    residual: Residual


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

    def decide(self, branch: str, step: int) -> bool:
        """True: everything is computed."""
        return True

    def record(self, branch: str, step: int, residual: Residual) -> None:
        """Measures the first tensor. Raises ValueError as the callable of `branch` does."""
        first = next(tensor for tensor in residual if tensor is not None)
        self._check_next(branch, step)
        self._measure(branch, first)

    def reuse(self, branch: str, step: int) -> Residual:
        """Never asked for: nothing is skipped."""
        raise RuntimeError("a calibration skips nothing")

    def free(self) -> None:
        """Lets go of the norms; the ratios stay."""
        self._norm.clear()

    def save(self, path: Path | str) -> None:
        """The ratios as JSON, for `MagCache.load`. Raises ValueError where nothing was measured."""
        _check_ratios(self.ratios)
        Path(path).write_text(json.dumps({"ratios": self.ratios}, indent=1) + "\n")

    def _run(self, name: str, blocks: Blocks, x: Tensor, step: int | None = None) -> Tensor:
        if step is not None:
            self._check_next(name, step)
        out = blocks(x)
        self._measure(name, (out - x).detach())
        return out

    def _check_next(self, name: str, step: int) -> None:
        following = len(self.ratios[name]) + 1 if name in self._norm else 0
        if step != following:
            raise ValueError(f"step: expected {following}, the next one, got {step}; calibrate on every step")

    def _measure(self, name: str, residual: Tensor) -> None:
        norm = torch.linalg.vector_norm(residual.float(), dim=-1)
        measured = self.ratios.setdefault(name, [])
        if name in self._norm:
            measured.append((norm / self._norm[name].clamp_min(1e-8)).mean().item())
        self._norm[name] = norm


def _check_ratios(ratios: Mapping[str, Sequence[float]]) -> None:
    if not ratios:
        raise ValueError("ratios: expected at least one branch, got none; measure them with MagCalibration")
    if len({len(values) for values in ratios.values()}) != 1:
        lengths = {name: len(values) for name, values in ratios.items()}
        raise ValueError(f"ratios: expected as many for every branch, got {lengths}")
    for name, values in ratios.items():
        if not all(math.isfinite(ratio) and ratio >= 0 for ratio in values):
            raise ValueError(f"ratios: expected finite numbers >= 0, branch {name!r} has others")
