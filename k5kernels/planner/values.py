"""Terms of a formula: numbers, or numpy arrays with one element a layout, under names that end in their unit."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Values = TypeVar("Values", float, NDArray[np.float64])


def plain(value: Any) -> Any:
    """A float where numpy gave a scalar or an array without dimensions; an array as it is."""
    return value if np.ndim(value) else float(value)


def term_words(name: str) -> str:
    """A term's name in words and without its unit: "block inputs" of "block_inputs_bytes"."""
    return " ".join(name.split("_")[:-1])
