"""`python -m bench.gpu.page`: write docs/measured_gpu.md, the figures of every committed results file."""

from pathlib import Path

from bench.gpu.results import COMMITTED, Results, Row

PAGE = Path(__file__).parents[2] / "docs" / "measured_gpu.md"
HEAD = """# Measured on GPUs

Written by `python -m bench.gpu.page` from the files in [bench/results/](../bench/results/), the only source of GPU
figures; `python -m bench.gpu --out DIR` writes such a file. TFLOP/s are on kept blocks. Medians; quartiles in brackets
where a run kept them.
"""


def page() -> str:
    """The text of the page."""
    files = sorted(COMMITTED.glob("*.json"))
    return "\n".join([HEAD, *(_part(path.name, Results.read(path)) for path in files)])


def _part(name: str, results: Results) -> str:
    machine = results.machine
    driver = "driver not kept" if machine.driver is None else f"driver {machine.driver}"
    lines = [f"## {machine.card}, {machine.date}", ""]
    lines += [
        f"`{name}`: {driver}, torch {machine.torch}, triton {machine.triton}, commit {machine.commit}.",
        "",
        *(f"- {section}: {end}" for section, end in results.sections.items()),
        "",
        "| section | size | mask | density | variant | median |",
        "|---|---|---|---|---|---|",
        *map(_line, results.rows),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    spread = "" if row.lower is None else f" ({row.lower:.4g} to {row.upper:.4g})"
    density = "" if row.density is None else f"{row.density:.1%}"
    found = row.unit if row.median is None else f"{row.median:.4g} {row.unit}{spread}"
    cells = (row.section, row.sizes, row.mask or "", density, row.variant, found)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
