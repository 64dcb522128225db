"""How the commands of `k5 plan` answer: terms of a formula as a table, figures as JSON and CSV."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from k5kernels.atomic import replacing
from k5kernels.planner.search import GIB
from k5kernels.terminal import console, table

SCHEMA = "k5.plan/1"


@dataclass(frozen=True)
class Unit:
    """Of a table: its name, and how many of the figures' own unit it is."""

    name: str
    size: float = 1


MS, GIBIBYTES = Unit("ms"), Unit("GiB", GIB)


def print_terms(
    command: str, title: str, inputs: Mapping[str, Any], terms: Any, unit: Unit, as_json: bool, csv_path: Path | None
) -> None:
    """The terms of a formula and their totals: all public properties that hold a number."""
    values = {field.name: float(getattr(terms, field.name)) for field in fields(terms)}
    totals = {
        name: float(getattr(terms, name)) for name, kind in vars(type(terms)).items() if isinstance(kind, property)
    }
    write_csv(csv_path, [{**inputs, **values, **totals}])
    if as_json:
        print_json(command, inputs, {"terms": values, **totals})
        return
    total = totals["total_ms" if unit is MS else "total_bytes"]
    console().print(table(title, ["term", "formula", unit.name], term_rows(terms, total, unit), inputs))


def term_rows(terms: Any, total: float, unit: Unit) -> list[list[str]]:
    """A term's name in words, without its unit, its formula and its value; then the total."""
    digits = 1 if unit.size == 1 else 2
    rows = [
        [
            " ".join(term.name.split("_")[:-1]),
            term.metadata["formula"],
            f"{getattr(terms, term.name) / unit.size:,.{digits}f}",
        ]
        for term in fields(terms)
    ]
    return [*rows, ["total", "", f"{total / unit.size:,.{digits}f}"]]


def print_json(command: str, inputs: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """One object: schema, command, inputs, and what the command answers."""
    typer.echo(json.dumps({"schema": SCHEMA, "command": command, "inputs": dict(inputs), **more}, indent=2))


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows with a header, where a path was given; the file is whole or not there."""
    if path is None:
        return
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
