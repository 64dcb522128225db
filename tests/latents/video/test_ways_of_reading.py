"""How a file is read: the words of the command line, and what is written into a manifest."""

from fractions import Fraction
from typing import Any

import pytest

from k5kernels.latents.video import AS_MODELS, EVERY_FRAME, Reading, parse_colour, parse_fps


@pytest.mark.parametrize(
    ("text", "fps"),
    [("24", 24), ("30000/1001", Fraction(30000, 1001)), ("23.976", Fraction("23.976")), ("source", None)],
)
def test_frames_a_second(text: str, fps: Fraction | int | None) -> None:
    assert parse_fps(text) == fps


@pytest.mark.parametrize("text", ["", "fast", "0", "-24", "1/0", "1001", "nan", "inf"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="fps: expected"):
        parse_fps(text)


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("black", (0, 0, 0)),
        ("white", (255,) * 3),
        ("grey", (128,) * 3),
        ("gray", (128,) * 3),
        ("#Ff8000", (255, 128, 0)),
    ],
)
def test_colours(text: str, colour: tuple[int, int, int]) -> None:
    assert parse_colour(text) == colour


@pytest.mark.parametrize("text", ["", "red", "#fff", "ff8000", "#ff80000", "#gg0000"])
def test_other_colours_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="background: expected black, white, grey or #rrggbb"):
        parse_colour(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": Fraction(0)}, "fps"),
        ({"background": (0, 0, 256)}, "background"),
        ({"background": (0, 0)}, "background"),
        ({"untagged_matrix": "bt2020"}, "untagged_matrix"),
    ],
)
def test_values_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        Reading(**settings)


def test_settings_have_what_is_not_as_it_always_was() -> None:
    assert AS_MODELS.settings() == {"fps": "24", "background": "#000000"}
    assert EVERY_FRAME.settings() == {"fps": "source", "background": "#000000"}
    other = Reading(Fraction(30000, 1001), (255, 128, 0), "bt601", square_pixels=True)
    assert other.settings() == {
        "fps": "30000/1001",
        "background": "#ff8000",
        "untagged_matrix": "bt601",
        "square_pixels": True,
    }
