"""The nano models that ship: a VAE and a CrossDiT small enough for a laptop, and the settings they sample with.

`train/nano_vae.py` and `train/nano_crossdit.py` made them; settings.json keeps the figures they reached.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
VAE_WEIGHTS = FOLDER / "vae.safetensors"
CROSSDIT_WEIGHTS = FOLDER / "crossdit.safetensors"
SETTINGS = FOLDER / "settings.json"

CLIP_FRAMES = 25
RESOLUTION = 256


@dataclass(frozen=True)
class NanoSettings:
    """How CrossDiT-nano samples.

    thr, sta: NABLA's threshold and window. guidance: classifier-free guidance. scheduler_scale: shift of the time
    grid. mag_ratios: MagCache's calibrated ratios of 50 steps, by branch.
    """

    thr: float
    sta: tuple[int, int, int]
    guidance: float
    scheduler_scale: float
    mag_ratios: dict[str, list[float]]


def load_settings() -> NanoSettings:
    """The shipped settings."""
    sampling = json.loads(SETTINGS.read_text())["sampling"]
    return NanoSettings(**sampling | {"sta": tuple(sampling["sta"])})
