"""A hardware profile from a results file of `python -m bench.gpu`: attention as measured, the rest the report's.

The step formula's attention term is a forward, its repetition where blocks are checkpointed, and a backward, at d0 (28
heads of 64) and S0: W/f + 3.5 W/t ms, where W is the forward's 4·tokens²·d0 operations, f the rate of the forward and t
that of forward and backward together, which are 3.5 times its operations. Rates are those of dense attention: the
planner multiplies the term by the density of a mask. A results file says nothing of the other two terms.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from k5kernels.planner.checks import positive_number, read_text
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import TOKEN_PIXELS
from k5kernels.planner.step import REFERENCE_MODEL_DIM, REFERENCE_PIXELS

REFERENCE_HEADS = "28 × 64"
FORWARD_AND_BACKWARD = 3.5  # seven matrix products instead of two


def profile_of_results(path: str | Path, name: str | None = None, base: HardwareProfile = H100) -> HardwareProfile:
    """The base with the attention coefficient of the card in the file, and its name.

    Raises OSError where the file cannot be read, ValueError that names it where it is no results file, or has no
    rates of dense attention with 28 heads of 64.
    """
    place = Path(path)
    try:
        found = json.loads(read_text(place, "results of bench.gpu as JSON"))
        card, rows = str(found["machine"]["card"]), list(found["rows"])
        forward, both = (_dense_rate(rows, section) for section in ("attention", "backward"))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: expected a results file of `python -m bench.gpu`: {error!r}"[:300]) from None
    except ValueError as error:
        raise ValueError(f"{place}: expected a results file of `python -m bench.gpu`: {error}"[:300]) from None
    work = 4 * (REFERENCE_PIXELS / TOKEN_PIXELS) ** 2 * REFERENCE_MODEL_DIM / 1e9
    return replace(base, name=name or card, attention_ms=work / forward + FORWARD_AND_BACKWARD * work / both)


def _dense_rate(rows: list[dict[str, Any]], section: str) -> float:
    """The best rate of dense attention in a section, in TFLOP/s."""
    rates = [
        positive_number(f"median of {row['variant']}", row["median"])
        for row in rows
        if row["section"] == section
        and row["unit"] == "TFLOP/s"
        and row["sizes"].endswith(REFERENCE_HEADS)
        and row["variant"].startswith("dense")
    ]
    if not rates:
        raise ValueError(f"no TFLOP/s of dense attention with {REFERENCE_HEADS} in the section {section!r}")
    return max(rates)
