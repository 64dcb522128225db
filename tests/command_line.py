"""The `k5` command, run in this process."""

import re

from typer.testing import CliRunner, Result

from k5kernels.cli import app


def k5(command: str, terminal: bool = False, columns: int = 160) -> Result:
    """terminal: whether stderr passes for one. columns: its width in letters."""
    return CliRunner(env={"COLUMNS": str(columns), "FORCE_COLOR": "1" if terminal else None}).invoke(
        app, command.split()
    )


def fails(command: str, exit_code: int, *words: str) -> None:
    """The command ends with that code and those words on stderr, nothing on stdout and no traceback."""
    result = k5(command)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    message = " ".join(re.sub(r"\x1b\[[\d;]*m|│", "", result.stderr).split())
    assert all(word in message for word in words), message
    assert isinstance(result.exception, SystemExit)
    if exit_code == 1:
        assert result.stderr.count("\n") == 1
