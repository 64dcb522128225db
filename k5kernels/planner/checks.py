"""Checks of the planner's inputs: every error names the field, what is allowed and what came."""

from numbers import Integral, Real

LARGEST = 2**63 - 1


def positive_integer(field: str, value: int) -> int:
    """The value as an int. Raises ValueError where it is not an integer in 1..2**63 - 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"{field}: expected an integer from 1 to 2**63 - 1, got {value!r}")
    return int(value)


def positive_number(field: str, value: float) -> float:
    """The value, an integer as int. Raises ValueError where it is not a number above 0 and up to 2**63 - 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise ValueError(f"{field}: expected a number above 0, up to 2**63 - 1, got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def share(field: str, value: float) -> float:
    """The value as a float. Raises ValueError where it is not a number above 0 and up to 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{field}: expected a number above 0, up to 1, got {value!r}")
    return float(value)
