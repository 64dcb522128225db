"""What the commands print where something is wrong: one line that can be read."""

import pytest
import typer

from k5kernels.terminal import LONGEST_LINE, one_line_errors


def printed(message: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(typer.Exit), one_line_errors():
        raise ValueError(message)
    return capsys.readouterr().err


def test_an_error_is_one_line(capsys):
    assert printed("a.tar:\n expected a whole tar", capsys) == "k5: a.tar: expected a whole tar\n"


def test_of_a_long_error_the_file_and_the_remedy_are_shown(capsys):
    line = printed(f"a.json: expected an int, got {'9' * 70_000}; write it again", capsys)
    assert line.startswith("k5: a.json: expected an int, got 999")
    assert line.endswith("999; write it again\n")
    assert len(line) <= LONGEST_LINE
