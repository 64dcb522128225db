"""`python -m bench.gpu_report [--write]`: print the table of GPU kernels; fails where a gate fails."""

import argparse
import sys

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.gpu_report import table
from k5_command import stop_in_one_line


def main() -> int:
    """0 where every gate holds and the committed table is what the compiler gives (or was rewritten)."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=table.__doc__)
    parser.add_argument("--write", action="store_true", help="replace table.json and table.md")
    write = parser.parse_args().write
    work = list(table.combinations())
    progress = Console(stderr=True)
    rows = [table.compile_row(*each) for each in track(work, "compiling", console=progress, transient=True)]
    _print(rows)
    problems = table.broken_gates(rows)
    if write:
        table.write(rows)
    elif rows != table.read():
        problems.append("the committed table differs: look at what changed, then run with --write")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _print(rows: list[table.Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    for line in table.header():
        console.print(line)
    shown = Table(*table.COLUMNS)
    for row in rows:
        shown.add_row(*table.cells(row), end_section=row.arch == table.ARCHS[-1].name)
    console.print(shown)


if __name__ == "__main__":
    stop_in_one_line("bench.gpu_report")
    sys.exit(main())
