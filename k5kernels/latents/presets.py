"""Presets of the encoding job: buckets, lengths and sizes of shards of the report's stages (Tables 2 and 4, §6.1.1).

They are data, presets.json: adding one needs no code.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from k5kernels.latents.video.buckets import Bucket, buckets_of


@dataclass(frozen=True)
class Preset:
    """stages: those of Table 4 that train on such latents. resolution: a class of BUCKETS, or buckets of its own.

    clip_frames: 121 (5 s at 24 frames/s) or 241 (10 s); 1 for pictures. fps: frames/s, as `parse_fps` takes it.
    samples_per_shard: §6.1.1.
    """

    name: str
    stages: str
    resolution: int | tuple[Bucket, ...]
    clip_frames: int
    fps: str
    samples_per_shard: int

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return buckets_of(self.resolution)


# Without a preset: small clips, which any machine encodes.
SMALL = Preset("small", "", resolution=256, clip_frames=25, fps="24", samples_per_shard=16)


@cache
def presets() -> dict[str, Preset]:
    """All of them, by name."""
    table = json.loads(files("k5kernels.latents").joinpath("presets.json").read_text())
    return {name: Preset(name, **row | {"resolution": _resolution(row["resolution"])}) for name, row in table.items()}


def named_preset(name: str) -> Preset:
    """Raises ValueError where there is none of that name."""
    if name not in presets():
        raise ValueError(f"preset: expected one of {', '.join(presets())}, got {name!r:.80}")
    return presets()[name]


def _resolution(value: int | list[list[int]]) -> int | tuple[Bucket, ...]:
    if isinstance(value, int):
        return value
    return tuple((height, width) for height, width in value)
