"""Sizes of the released models (Table 3), and the settings each of them was released with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from model.config import AttentionConfig, CrossDiTConfig

PRESETS: dict[str, CrossDiTConfig] = {
    "image_lite": CrossDiTConfig(
        model_dim=2560,
        time_dim=512,
        ff_dim=10240,
        text_blocks=2,
        visual_blocks=50,
        axes_dims=(32, 48, 48),
        visual_cond=False,
    ),
    "video_lite": CrossDiTConfig(
        model_dim=1792, time_dim=512, ff_dim=7168, text_blocks=2, visual_blocks=32, axes_dims=(16, 24, 24)
    ),
    "video_pro": CrossDiTConfig(
        model_dim=4096, time_dim=1024, ff_dim=16384, text_blocks=4, visual_blocks=60, axes_dims=(32, 48, 48)
    ),
    # Trained here on CPU for the demo: the architecture at a width where approximations can still be judged.
    "nano": CrossDiTConfig(
        model_dim=192,
        time_dim=48,
        ff_dim=448,
        text_blocks=1,
        visual_blocks=8,
        axes_dims=(16, 24, 24),
        in_text_dim=384,
        in_text_dim2=384,
    ),
}


@dataclass(frozen=True)
class ReleasedSettings:
    """How a released model is meant to be sampled.

    guidance: weight of classifier-free guidance, 1 = one pass a step. num_steps: Euler steps.
    rope_scale: divisors of visual positions (t, h, w). scheduler_scale: shift of the time grid, None where the
    release names none. mag_ratios: MagCache's calibrated ratios, conditional and unconditional in turn from the
    second step on, None where not calibrated (§7.2).
    """

    config: CrossDiTConfig
    guidance: float
    num_steps: int
    rope_scale: tuple[float, float, float]
    scheduler_scale: float | None
    attention: AttentionConfig
    mag_ratios: tuple[float, ...] | None


def _load(path: Path) -> dict[str, ReleasedSettings]:
    settings = {}
    for name, entry in json.loads(path.read_text()).items():
        attention, ratios = entry["attention"], entry["mag_ratios"]
        if "sta" in attention:
            attention = {**attention, "sta": tuple(attention["sta"])}
        settings[name] = ReleasedSettings(
            # Image editing takes its source as a condition: Image Lite with more input channels.
            config=replace(PRESETS[entry["model"]], visual_cond=entry["visual_cond"]),
            guidance=entry["guidance"],
            num_steps=entry["num_steps"],
            rope_scale=tuple(entry["rope_scale"]),
            scheduler_scale=entry["scheduler_scale"],
            attention=AttentionConfig(**attention),
            mag_ratios=None if ratios is None else tuple(ratios),
        )
    return settings


RELEASED: dict[str, ReleasedSettings] = _load(Path(__file__).parent / "released_presets.json")
