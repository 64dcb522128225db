"""Latent shards as training batches."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.latents.shards import Sample, read_shard

Grid = tuple[int, int, int]  # T, H, W of a latent


def read_shards(folder: Path) -> Iterator[Sample]:
    """All samples of a folder's shards, in order."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"{folder}: expected latent shards (*.tar), found none; make some with k5 encode")
    for shard in shards:
        yield from read_shard(shard)


def channels_last(sample: Sample) -> Tensor:
    """The latent as CrossDiT takes it: float32 [T, H, W, 16]."""
    return sample.latent.float().permute(1, 2, 3, 0).contiguous()


@dataclass(frozen=True)
class LatentBatch:
    """latents: float32 [B, T, H, W, 16], all of one grid. captions: B strings. samples: B names, for messages."""

    latents: Tensor
    captions: list[str]
    samples: list[str]


@dataclass(frozen=True)
class _Clip:
    """latent: float32 [T, H, W, 16]. name: the sample's key and source, for messages."""

    latent: Tensor
    caption: str
    name: str


class LatentSet:
    """Samples held in memory, drawn in batches of one grid."""

    def __init__(self, samples: Iterable[Sample], captions: dict[str, str]) -> None:
        """captions: by the stem of a sample's source file; a source without one trains on the empty prompt.

        Raises ValueError where there is no sample.
        """
        self._grids: dict[Grid, list[_Clip]] = defaultdict(list)
        for sample in samples:
            latent, source = channels_last(sample), sample.record.source
            clip = _Clip(latent, captions.get(Path(source).stem, ""), f"{sample.key} of {source}")
            T, H, W, _ = latent.shape
            self._grids[T, H, W].append(clip)
        if not self._grids:
            raise ValueError("samples: expected at least one latent, got none; encode a video first (k5 encode)")

    @property
    def grids(self) -> dict[Grid, int]:
        """Latent [T, H, W] -> how many samples have it."""
        return {grid: len(samples) for grid, samples in self._grids.items()}

    def draw(self, generator: torch.Generator, size: int, frames: int | None = None) -> LatentBatch:
        """A batch of one grid, grids weighted by their samples; `frames` keeps the first latent frames only."""
        grids = list(self._grids)
        weights = torch.tensor([float(len(self._grids[grid])) for grid in grids])
        samples = self._grids[grids[int(torch.multinomial(weights, 1, generator=generator))]]
        chosen = [samples[int(i)] for i in torch.randint(len(samples), (size,), generator=generator)]
        latents = torch.stack([clip.latent[:frames] for clip in chosen])
        return LatentBatch(latents, [clip.caption for clip in chosen], [clip.name for clip in chosen])
