"""How a file is read, where it can be read in more than one way."""

import re
from dataclasses import dataclass
from fractions import Fraction

MATRICES = ("bt601", "bt709")
NAMED_COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "gray": (128, 128, 128)}
# The models were trained on 24 frames a second.
MODEL_FPS = Fraction(24)


@dataclass(frozen=True)
class Reading:
    """What becomes of a file's frames.

    fps: frames/s to resample to, by the frames' time stamps; None takes every frame of the source.
    background: red, green, blue behind what is transparent, 0 to 255.
    untagged_matrix: "bt601" or "bt709" for files that do not name their colour matrix; None decides by size, as
    players do: BT.709 from 1280 pixels of width or more than 576 of height on.
    square_pixels: take pixels as square, whatever the file says.
    """

    fps: Fraction | None = MODEL_FPS
    background: tuple[int, int, int] = (0, 0, 0)
    untagged_matrix: str | None = None
    square_pixels: bool = False

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps: expected more than 0 and at most 1000 frames a second, got {self.fps}")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background: expected red, green, blue from 0 to 255, got {self.background}")
        if self.untagged_matrix not in (None, *MATRICES):
            raise ValueError(f"untagged_matrix: expected one of {MATRICES} or None, got {self.untagged_matrix!r}")

    def settings(self) -> dict[str, str | bool]:
        """What the frames depend on, as JSON values."""
        settings: dict[str, str | bool] = {
            "fps": "source" if self.fps is None else str(self.fps),
            "background": "#" + bytes(self.background).hex(),
        }
        if self.untagged_matrix is not None:
            settings["untagged_matrix"] = self.untagged_matrix
        if self.square_pixels:
            settings["square_pixels"] = True
        return settings


# At the rate of the models.
AS_MODELS = Reading()
# Every frame as it is, instead.
EVERY_FRAME = Reading(fps=None)


def parse_fps(text: str) -> Fraction | None:
    """ "24", "30000/1001", or "source" for every frame (None). Raises ValueError for anything else."""
    if text == "source":
        return None
    try:
        fps = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"fps: expected a number such as 24 or 30000/1001, or source, got {text!r}") from None
    return Reading(fps=fps).fps


def parse_colour(text: str) -> tuple[int, int, int]:
    """ "black", "white", "grey" or "#rrggbb". Raises ValueError for anything else."""
    if text in NAMED_COLOURS:
        return NAMED_COLOURS[text]
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(f"background: expected black, white, grey or #rrggbb, got {text!r}")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue
