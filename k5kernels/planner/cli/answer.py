"""How the commands of `k5 plan` answer: terms of a formula as a table, figures as JSON and CSV."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from k5kernels.planner.csv_rows import write_rows
from k5kernels.planner.search import GIB
from k5kernels.planner.values import term_words
from k5kernels.terminal import console, table

SCHEMA = "k5.plan/2"


@dataclass(frozen=True)
class Unit:
    """Of a table: its name, and how many of the figures' own unit it is."""

    name: str
    size: float = 1


MS, GIBIBYTES = Unit("ms"), Unit("GiB", GIB)


def print_terms(
    command: str,
    title: str,
    inputs: Mapping[str, Any],
    terms: Any,
    unit: Unit,
    as_json: bool,
    csv_path: Path | None,
    formulas: Mapping[str, str] | None = None,
) -> None:
    """The terms of a formula and their totals: all public properties that hold a number.

    formulas: name -> formula of the terms to show; all, with the formulas of the dataclass's fields, where None.
    """
    formulas = _formulas(terms) if formulas is None else formulas
    values = {name: float(getattr(terms, name)) for name in formulas}
    totals = {
        name: float(getattr(terms, name)) for name, kind in vars(type(terms)).items() if isinstance(kind, property)
    }
    write_csv(csv_path, [{**inputs, **values, **totals}])
    if as_json:
        print_json(command, inputs, {"terms": values, **totals})
        return
    total = totals["total_ms" if unit is MS else "total_bytes"]
    console().print(table(title, ["term", "formula", unit.name], term_rows(terms, total, unit, formulas), inputs))


def term_rows(terms: Any, total: float, unit: Unit, formulas: Mapping[str, str] | None = None) -> list[list[str]]:
    """A term's name in words, without its unit, its formula and its value; then the total."""
    digits = 1 if unit.size == 1 else 2
    rows = [
        [term_words(name), formula, f"{getattr(terms, name) / unit.size:,.{digits}f}"]
        for name, formula in (_formulas(terms) if formulas is None else formulas).items()
    ]
    return [*rows, ["total", "", f"{total / unit.size:,.{digits}f}"]]


def _formulas(terms: Any) -> dict[str, str]:
    return {term.name: term.metadata["formula"] for term in fields(terms)}


def print_json(command: str, inputs: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """One object: schema, command, inputs, and what the command answers."""
    typer.echo(json.dumps({"schema": SCHEMA, "command": command, "inputs": dict(inputs), **more}, indent=2))


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as CSV where a path was given."""
    if path is not None:
        write_rows(path, rows)
