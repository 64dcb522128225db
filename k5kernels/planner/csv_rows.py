"""Figures as rows of a CSV file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k5kernels.atomic import replacing


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows under a header of their keys. Raises OSError where it cannot be written; a former file then stays."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
