"""Which steps of a run are computed, from how the residual's magnitude changes over it (§7.2; arXiv 2506.09045)."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import fmean

SMALLEST = 1e-8  # of a ratio, where its logarithm is taken


def compute_schedule(ratios: Sequence[float], threshold: float, max_skips: int, retention: float) -> list[bool]:
    """For every step, whether its blocks run.

    ratios: one a step from the second on, so len(ratios) + 1 steps. The first step, all of the first `retention`
    (a share, 0..1) and the last run. Between them, a step is skipped while the sum of |1 - product| over the skipped
    steps and this one stays below `threshold` and no more than `max_skips` are skipped in a row.
    """
    steps = len(ratios) + 1
    # The tolerance keeps 0.2 of 35 steps at 7 in floating point.
    first_skippable = max(1, math.ceil(retention * steps - 1e-9))
    schedule = []
    product, error, skipped = 1.0, 0.0, 0
    for step in range(steps):
        computed = step < first_skippable or step == steps - 1
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
    """The ratios for another number of steps, by the curve that they add up to.

    The logarithm of the magnitude over the run is taken as linear between the calibrated steps; first stands on first
    and last on last. So the ratios over a longer step are the product of those it covers, and all of them have the same
    product as before.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if steps == len(ratios) + 1:
        return list(ratios)
    curve = [0.0, *accumulate(math.log(max(ratio, SMALLEST)) for ratio in ratios)]
    places = [step * (len(curve) - 1) / (steps - 1) for step in range(steps)] if steps > 1 else []
    return [math.exp(_at(curve, there) - _at(curve, here)) for here, there in pairwise(places)]


def _at(curve: Sequence[float], place: float) -> float:
    """Linear between the points of the curve, which stand at 0, 1, 2 and so on."""
    before = min(int(place), len(curve) - 1)
    after = min(before + 1, len(curve) - 1)
    return curve[before] + (place - before) * (curve[after] - curve[before])


def reuse_errors(ratios: Sequence[float], schedule: Sequence[bool]) -> list[float]:
    """For every step |1 - product of the ratios since the last computed step|; 0 where it is computed itself."""
    errors, product = [], 1.0
    for step, computed in enumerate(schedule):
        product = 1.0 if computed else product * ratios[step - 1]
        errors.append(abs(1.0 - product))
    return errors


def threshold_for(
    ratios: Mapping[str, Sequence[float]],
    max_skips: int,
    retention: float,
    *,
    error: float | None = None,
    speedup: float | None = None,
) -> float:
    """The threshold that reaches a target with these ratios, all of one number of steps.

    error: the largest threshold whose mean of `reuse_errors`, over all steps and branches, is at most this. speedup:
    the smallest one with which all passes are at least so many times those computed.

    Raises ValueError where both or neither are given, or where no threshold reaches the target.
    """
    if (error is None) == (speedup is None):
        raise ValueError(f"expected either error or speedup, got error={error} and speedup={speedup}")
    candidates = _thresholds(ratios, max_skips)
    schedules = [
        {name: compute_schedule(values, threshold, max_skips, retention) for name, values in ratios.items()}
        for threshold in candidates
    ]
    if speedup is not None:
        speedups = [speedup_of(schedule) for schedule in schedules]
        for threshold, reached in zip(candidates, speedups, strict=True):
            if reached >= speedup:
                return threshold
        raise ValueError(
            f"speedup: at most {max(speedups):.2f} with max_skips {max_skips} and retention {retention}, "
            f"expected no more, got {speedup}; raise max_skips or lower retention"
        )
    assert error is not None
    if error < 0:
        raise ValueError(f"error: expected at least 0, got {error}")

    def mean_error(schedule: Mapping[str, Sequence[bool]]) -> float:
        return fmean(one for name, values in ratios.items() for one in reuse_errors(values, schedule[name]))

    return max(
        threshold for threshold, schedule in zip(candidates, schedules, strict=True) if mean_error(schedule) <= error
    )


def speedup_of(schedule: Mapping[str, Sequence[bool]]) -> float:
    """Passes of a run for each computed one."""
    passes = [computed for steps in schedule.values() for computed in steps]
    return len(passes) / sum(passes)


def _thresholds(ratios: Mapping[str, Sequence[float]], max_skips: int) -> list[float]:
    """0, and just above every sum at which some step is decided: between two of them no schedule changes."""
    sums = {0.0}
    for values in ratios.values():
        for start in range(len(values)):
            products = accumulate(values[start : start + max_skips], lambda product, ratio: product * ratio)
            errors = accumulate(abs(1.0 - product) for product in products)
            sums.update(math.nextafter(total, math.inf) for total in errors)
    return sorted(sums)
