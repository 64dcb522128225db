"""Checks of the planner's inputs: every error names the field, what is allowed and what came."""

from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path

LARGEST = 2**63 - 1
MOST_FILE_BYTES = 16 << 20
_MOST_SHOWN = 80


def shown(value: object) -> str:
    """The value for an error message, cut where it is long."""
    try:
        words = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        words = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return words if len(words) <= _MOST_SHOWN else f"{words[:_MOST_SHOWN]}…"


def positive_integer(field: str, value: int, largest: int = LARGEST) -> int:
    """The value as an int. Raises ValueError where it is not an integer from 1 to the largest."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ValueError(f"{field}: expected an integer from 1 to {_limit(largest)}, got {shown(value)}")
    return int(value)


def positive_number(field: str, value: float) -> float:
    """The value, an integer as int. Raises ValueError where it is not a number above 0 and up to 2**63 - 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise ValueError(f"{field}: expected a number above 0, up to {_limit(LARGEST)}, got {shown(value)}")
    return int(value) if isinstance(value, Integral) else float(value)


def share(field: str, value: float) -> float:
    """The value as a float. Raises ValueError where it is not a number above 0 and up to 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{field}: expected a number above 0, up to 1, got {shown(value)}")
    return float(value)


def switch(field: str, value: bool) -> bool:
    """The value. Raises ValueError where it is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}: expected True or False, got {shown(value)}")
    return value


def one_of(field: str, value: str, allowed: Collection[str]) -> str:
    """The value. Raises ValueError where it is none of the allowed."""
    if value not in allowed:
        raise ValueError(f"{field}: expected one of {', '.join(allowed)}, got {shown(value)}")
    return value


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises OSError where it cannot be read, ValueError where it is too long or not UTF-8."""
    with path.open("rb") as file:
        content = file.read(MOST_FILE_BYTES + 1)
    if len(content) > MOST_FILE_BYTES:
        raise ValueError(f"{path}: expected {what}, got a file of more than {MOST_FILE_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {what} as UTF-8 text, got other bytes at {error.start}") from None


def _limit(largest: int) -> str:
    return "2**63 - 1" if largest == LARGEST else f"{largest:,}"
