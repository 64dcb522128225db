"""What the commands of `k5` share: one-line errors, and text and tables on the terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# Of every command that computes; `k5kernels.device.choose_device` takes it.
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; without it a GPU if there is one")
]


@contextmanager
def one_line_errors(program: str = "k5") -> Iterator[None]:
    """Ends the program with one line on stderr and exit code 1 on an error the user can mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        complain(error, program)
        raise typer.Exit(1) from None


def complain(message: object, program: str = "k5") -> None:
    """One line on stderr."""
    typer.echo(f"{program}: {' '.join(str(message).split())}", err=True)


def console(stderr: bool = False) -> Console:
    """Prints text as it is: square brackets in it are not markup."""
    return Console(stderr=stderr, markup=False, highlight=False)


def table(title: str, header: list[str], rows: list[list[str]], inputs: Mapping[str, Any] | None = None) -> Table:
    """A table of text; inputs, where given, stand below it."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in (inputs or {}).items()}
    caption = ", ".join(f"{name} {value}" for name, value in shown.items()) or None
    made = Table(*header, title=title, title_justify="left", caption=caption, caption_justify="left")
    for row in rows:
        made.add_row(*row)
    return made
