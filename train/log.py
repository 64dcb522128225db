"""The log of a training: log.jsonl, one row of JSON every so many steps."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any


class Log:
    """Rows on disk; each has at least `step`, `loss` and `step_ms` (mean of the steps since the row before)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        with self.path.open("a") as file:
            print(json.dumps(row), file=file)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in order."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def seconds(self) -> float:
        """Time of all steps, without checkpoints and what was measured between them."""
        steps = [{"step": 0}, *self.rows()]
        return sum((row["step"] - before["step"]) * row["step_ms"] / 1e3 for before, row in pairwise(steps))
