"""The files in bench/results/, the only source of figures of a GPU.

A file is one run on one card: {"machine": Machine, "rows": [Row, ...], "sections": {section: how it ended}}.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from k5kernels.atomic import replacing

COMMITTED = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Machine:
    """card and driver: as the driver names them. commit: of this repository. Where a run did not say, None."""

    card: str
    driver: str | None
    torch: str
    triton: str | None
    commit: str | None
    date: str

    @property
    def file_name(self) -> str:
        """<card>-<date>.json, the card without what is not a letter or a digit."""
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower().removeprefix("nvidia ")).strip("-")
        return f"{card}-{self.date}.json"


@dataclass(frozen=True)
class Row:
    """One variant on one input. sizes: the clip, heads and head dimension in words. mask, density: None without one.

    unit: "ms", "TFLOP/s" (on kept blocks), "MiB" and so on. median: None where the variant did not run; unit then says
    why. lower, upper: quartiles over the repetitions, None where a run did not keep them. repetitions: how many there
    were.
    """

    section: str
    sizes: str
    mask: str | None
    density: float | None
    variant: str
    unit: str
    median: float | None
    lower: float | None = None
    upper: float | None = None
    repetitions: int | None = None


@dataclass(frozen=True)
class Results:
    """sections: each one's end, "done" or what went wrong in words."""

    machine: Machine
    rows: Sequence[Row]
    sections: Mapping[str, str]

    def write(self, folder: Path) -> Path:
        """Write the file whole: what was there before stays until the new one is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.machine.file_name
        rows = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in self.rows)
        head, ends = (json.dumps(x, ensure_ascii=False) for x in (asdict(self.machine), dict(self.sections)))
        with replacing(path) as part:
            part.write_text(f'{{"machine": {head},\n"sections": {ends},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises TypeError where a row has a field that `Row` does not have, or lacks one."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(Machine(**found["machine"]), [Row(**row) for row in found["rows"]], found["sections"])
