"""Coefficients of the step formula (§7.3.1) from measured steps, and how well they predict steps left out.

    step = d/d0 · S/S0 · (c0 + c1 · ρ · S/S0 + c2 · d/d0) · L · B

ρ: density of the attention mask. c0, c1, c2 ≥ 0 are those that leave the least sum of squared relative errors, so
that short steps count as much as long ones.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from io import StringIO
from pathlib import Path
from statistics import fmean

import numpy as np

from k5kernels.planner.checks import positive_integer, positive_number, read_text, share
from k5kernels.planner.csv_rows import write_rows
from k5kernels.planner.least_squares import relative_fit
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import TOKEN_PIXELS
from k5kernels.planner.step import step_time_terms

COEFFICIENTS = 3
FOLDS = 3


@dataclass(frozen=True)
class MeasuredStep:
    """One training step, a row of a CSV with these columns.

    model_dim: d. tokens: visual tokens of a clip. blocks: L. batch: B, clips on the device. density: share of block
    pairs that attention reads, 1 where it is dense. step_ms: its time.
    Raises ValueError that names the column where one is not positive, or the density is above 1.
    """

    model_dim: int
    tokens: int
    blocks: int
    batch: int
    density: float
    step_ms: float

    def __post_init__(self) -> None:
        for name in ("model_dim", "tokens", "blocks", "batch"):
            positive_integer(name, getattr(self, name))
        share("density", self.density)
        positive_number("step_ms", self.step_ms)


COLUMNS = tuple(field.name for field in fields(MeasuredStep))


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted / measured − 1| of steps that the fit did not see."""

    mean: float
    worst: float
    steps: int


def predict_ms(step: MeasuredStep, profile: HardwareProfile) -> float:
    """What the profile's coefficients say of the step, in ms; its own time is not looked at."""
    return sum(_terms(step, profile))


def fit(steps: Sequence[MeasuredStep], name: str, base: HardwareProfile = H100) -> HardwareProfile:
    """A profile with the coefficients fitted to the steps, and all else from `base`.

    Raises ValueError where the steps are too few, or too alike to tell the three coefficients apart.
    """
    if len(steps) < COEFFICIENTS:
        raise ValueError(f"steps: expected at least {COEFFICIENTS} measured steps, got {len(steps)}")
    unit = replace(base, name=name, tokenwise_ms=1, attention_ms=1, linear_ms=1)
    terms = np.array([_terms(step, unit) for step in steps])
    if np.linalg.matrix_rank(terms / terms.max(axis=0)) < COEFFICIENTS:
        raise ValueError(
            "steps: expected at least three that differ in tokens and in model_dim, which the coefficients are told "
            f"apart by, got {len(steps)} that do not"
        )
    constant, tokens, width = relative_fit(terms, np.array([step.step_ms for step in steps])).tolist()
    return replace(unit, tokenwise_ms=constant, attention_ms=tokens, linear_ms=width)


def held_out_errors(steps: Sequence[MeasuredStep]) -> list[Errors]:
    """Fitted on every third step, how far the others are off: for each of the three ways to begin."""
    found = []
    for first in range(FOLDS):
        profile = fit(steps[first::FOLDS], "a third")
        rest = [step for number, step in enumerate(steps) if number % FOLDS != first]
        errors = [abs(predict_ms(step, profile) / step.step_ms - 1) for step in rest]
        found.append(Errors(fmean(errors), max(errors), len(errors)))
    return found


def read_steps(path: str | Path) -> list[MeasuredStep]:
    """The rows of a CSV with the columns of `MeasuredStep`; others are passed over.

    Raises OSError where it cannot be read, ValueError that names the file, the line and the column where a row is
    not a step.
    """
    rows = csv.DictReader(StringIO(read_text(Path(path), "measured steps as CSV"), newline=""))
    try:
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or [])]:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got none named {', '.join(missing)}")
        return [_step(row, f"{path}:{rows.line_num}") for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: expected measured steps as CSV: {error}") from None


def write_steps(path: str | Path, steps: Sequence[MeasuredStep]) -> None:
    """The steps as a CSV that `read_steps` reads. Raises OSError where it cannot be written."""
    write_rows(path, [asdict(step) for step in steps])


def _step(row: dict[str, str], place: str) -> MeasuredStep:
    try:
        values = {f.name: (int if f.type is int else float)(row[f.name]) for f in fields(MeasuredStep)}
        return MeasuredStep(**values)  # type: ignore[arg-type]  # each of its field's type
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: expected the columns {', '.join(COLUMNS)} of a step: {error}") from None


def _terms(step: MeasuredStep, profile: HardwareProfile) -> tuple[float, float, float]:
    """The terms of the three coefficients, in ms."""
    terms = step_time_terms(step.model_dim, step.tokens * TOKEN_PIXELS, step.blocks, step.batch, profile)
    return terms.tokenwise_ms, step.density * terms.attention_ms, terms.linear_ms
