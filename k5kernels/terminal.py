"""What the commands of `k5` share: one-line errors, and text and tables on the terminal."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

# Of every command that computes; `k5kernels.device.choose_device` takes it.
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; without it a GPU if there is one")
]

LONGEST_LINE = 800  # characters of an error


@contextmanager
def one_line_errors(program: str = "k5", refused: int = 1) -> Iterator[None]:
    """Ends the program with one line on stderr and exit code 1 on an error the user can mend.

    refused: exit code where what the user asked for cannot be (ValueError), rather than what the system could not do.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        complain(error, program)
        raise typer.Exit(1 if isinstance(error, OSError) else refused) from None


class Stopped(BaseException):
    """SIGTERM or Ctrl-C; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def one_line_stop(program: str, state: Callable[[], str]) -> Iterator[None]:
    """SIGTERM and Ctrl-C inside end the program with one line on stderr and exit code 128 + the signal's number.

    Code inside sees the exception Stopped. state: what is left, in words for that line. Main thread only.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Stopped as stopped:
        complain(f"stopped by {stopped}; {state()}", program)
        raise typer.Exit(128 + stopped.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def complain(message: object, program: str = "k5") -> None:
    """One line on stderr; of a long one, as where a damaged file is quoted, the start and the end."""
    line = printable(message)
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 4 :]}"
    typer.echo(f"{program}: {line}", err=True)


def printable(message: object) -> str:
    """In one line, and what a terminal cannot show (control characters, bytes of a name that are no UTF-8) escaped."""
    line = " ".join(str(message).split())
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in line)


def console(stderr: bool = False) -> Console:
    """Prints text as it is: square brackets in it are not markup."""
    return Console(stderr=stderr, markup=False, highlight=False)


def table(title: str, header: list[str], rows: list[list[str]], inputs: Mapping[str, Any] | None = None) -> Table:
    """A table of text; inputs, where given, stand below it. The cells of the first column, names, are never broken."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in (inputs or {}).items()}
    caption = ", ".join(f"{name} {value}" for name, value in shown.items()) or None
    first, *others = header
    made = Table(
        Column(first, no_wrap=True), *others, title=title, title_justify="left", caption=caption, caption_justify="left"
    )
    for row in rows:
        made.add_row(*row)
    return made


def _escaped(letter: str) -> str:
    number = ord(letter)
    if 0xDC80 <= number <= 0xDCFF:  # a byte, as os.fsdecode puts it
        return f"\\x{number - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()
