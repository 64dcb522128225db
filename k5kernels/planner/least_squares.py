"""Coefficients of terms that add up to a measured figure."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray


def relative_fit(terms: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients x ≥ 0 [k] with the least sum of squares of terms · x / measured − 1, so that small figures count as
    much as large ones.

    terms: [n, k], a row a measurement; a column of zeros gets 0. measured: [n], above 0. The best of the few sets of
    columns that may be above 0 is taken: k is small.
    """
    relative = terms / measured[:, None]
    scale = relative.max(axis=0)
    best, least = np.zeros(terms.shape[1]), float(len(measured))
    usable = np.flatnonzero(scale)
    for count in range(1, len(usable) + 1):
        for columns in map(list, combinations(usable, count)):
            found = np.linalg.lstsq(relative[:, columns] / scale[columns], np.ones(len(measured)), rcond=None)[0]
            rest = float(np.square(relative[:, columns] / scale[columns] @ found - 1).sum())
            if (found >= 0).all() and rest < least:
                least, best = rest, np.zeros(terms.shape[1])
                best[columns] = found / scale[columns]
    return best
