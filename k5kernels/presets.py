"""Sizes of the released models (Table 3), and the settings each of them was released with."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from k5kernels.attention.config import AttentionConfig


@dataclass(frozen=True)
class CrossDiTConfig:
    """Sizes of a CrossDiT (Table 3); checked when made.

    model_dim: width d. time_dim: width of the time embedding. ff_dim: hidden width of the MLPs.
    text_blocks: blocks of the linguistic token refiner (LTF). visual_blocks: CrossDiT blocks L.
    axes_dims: channels of a head that rotate with (time, height, width); their sum is the head dim D.
    in_visual_dim, out_visual_dim: latent channels. patch_size: latent cells (t, h, w) in one token.
    visual_cond: the input also carries a condition latent and its mask.
    in_text_dim, in_text_dim2: widths of the text tokens and of the pooled text embedding.
    """

    model_dim: int
    time_dim: int
    ff_dim: int
    text_blocks: int
    visual_blocks: int
    axes_dims: tuple[int, int, int]
    in_visual_dim: int = 16
    out_visual_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    visual_cond: bool = True
    in_text_dim: int = 3584
    in_text_dim2: int = 768

    def __post_init__(self) -> None:
        if any(dim < 2 or dim % 2 for dim in self.axes_dims) or len(self.axes_dims) != 3:
            raise ValueError(f"axes_dims: expected three even positive numbers, got {self.axes_dims}")
        if self.model_dim % self.head_dim:
            raise ValueError(
                f"model_dim: expected a multiple of the head dim {self.head_dim} = sum(axes_dims), got {self.model_dim}"
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size: expected three positive numbers (t, h, w), got {self.patch_size}")

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return sum(self.axes_dims)

    @property
    def heads(self) -> int:
        """Heads of every attention, h."""
        return self.model_dim // self.head_dim

    @property
    def input_channels(self) -> int:
        """Channels of the model's input: the noisy latent, and where conditioned a second latent and its mask."""
        return 2 * self.in_visual_dim + 1 if self.visual_cond else self.in_visual_dim

    @property
    def patch_cells(self) -> int:
        """Latent cells in one token."""
        return math.prod(self.patch_size)


MODEL_SIZES: dict[str, CrossDiTConfig] = {
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
            config=replace(MODEL_SIZES[entry["model"]], visual_cond=entry["visual_cond"]),
            guidance=entry["guidance"],
            num_steps=entry["num_steps"],
            rope_scale=tuple(entry["rope_scale"]),
            scheduler_scale=entry["scheduler_scale"],
            attention=AttentionConfig(**attention),
            mag_ratios=None if ratios is None else tuple(ratios),
        )
    return settings


RELEASED: dict[str, ReleasedSettings] = _load(Path(__file__).parent / "released_presets.json")
