"""Latent shards as training batches."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.latents.captions import match_captions
from k5kernels.latents.shards import Sample, read_shard
from k5kernels.planner.shapes import PATCH

Grid = tuple[int, int, int]  # T, H, W of a latent
Resolution = tuple[int, int]  # H, W of a latent


@dataclass(frozen=True)
class StoredSample(Sample):
    """A sample and the shard it was read from."""

    shard: str = ""


def read_shards(folder: Path) -> Iterator[StoredSample]:
    """All samples of a folder's shards, in order.

    Raises ValueError where there is no shard, and ShardError, which names the shard, where one is not whole.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        found = "found none" if folder.is_dir() else "found no such folder"
        raise ValueError(f"{folder}: expected latent shards (*.tar), {found}; make some with k5 encode")
    for shard in shards:
        for sample in read_shard(shard):
            yield StoredSample(sample.key, sample.latent, sample.record, sample.tensors, str(shard))


def channels_last(sample: Sample) -> Tensor:
    """The latent as CrossDiT takes it: float32 [T, H, W, 16]."""
    return sample.latent.float().permute(1, 2, 3, 0).contiguous()


@dataclass(frozen=True)
class LatentBatch:
    """latents: float32 [B, T, H, W, 16], all of one grid. captions: B strings. samples: B names, for messages."""

    latents: Tensor
    captions: list[str]
    samples: list[str]

    @property
    def tokens(self) -> int:
        """Visual tokens of one sample."""
        _, T, H, W, _ = self.latents.shape
        return T * (H // PATCH) * (W // PATCH)


@dataclass(frozen=True)
class _Clip:
    """latent: float32 [T, H, W, 16]. name: the sample's shard, key and source, for messages."""

    latent: Tensor
    caption: str
    name: str


def _name(sample: Sample) -> str:
    where = f"{sample.shard}: " if isinstance(sample, StoredSample) else ""
    return f"{where}{sample.key} of {sample.record.source}"


class LatentSet:
    """Samples held in memory, drawn in batches of one grid.

    description: how many samples there are, and a hash of their keys, captions and latents in order.
    captioned: how many samples have a caption; the others train on the empty prompt.
    """

    def __init__(self, samples: Iterable[Sample], captions: Mapping[str, str] | None) -> None:
        """captions: by a sample's source, as `match_captions` takes them; they go before the caption in the sample's
        record. None: no sample has one.

        Raises ValueError where there is no sample, one whose latent is not finite, or a caption that fits two sources.
        """
        samples = list(samples)
        given = match_captions(captions or {}, (sample.record.source for sample in samples))
        self.captioned = 0
        self._grids: dict[Grid, list[_Clip]] = defaultdict(list)
        digest = hashlib.sha256()
        for sample in samples:
            latent, name = channels_last(sample), _name(sample)
            if not latent.isfinite().all():
                raise ValueError(f"{name}: expected a finite latent, got inf or nan; encode this video again")
            caption = "" if captions is None else given.get(sample.record.source, sample.record.caption or "")
            self.captioned += bool(caption)
            clip = _Clip(latent, caption, name)
            T, H, W, _ = latent.shape
            self._grids[T, H, W].append(clip)
            digest.update(f"{sample.key}\n{clip.caption}\n{T} {H} {W}\n".encode())
            digest.update(latent.numpy().tobytes())
        if not self._grids:
            raise ValueError("samples: expected at least one latent, got none; encode a video first (k5 encode)")
        count = sum(self.grids.values())
        self.description = f"{count} samples, sha256 {digest.hexdigest()[:16]}"

    @property
    def grids(self) -> dict[Grid, int]:
        """Latent [T, H, W] -> how many samples have it."""
        return {grid: len(samples) for grid, samples in self._grids.items()}

    def weights(
        self, images: bool | None = None, resolutions: Iterable[tuple[Resolution, float]] | None = None
    ) -> dict[Grid, float]:
        """Latent [T, H, W] -> how often it is drawn, as `draw` says; the weights need not sum to 1."""
        drawn = dict(self.grids)
        if images is not None and any((grid[0] == 1) == images for grid in drawn):
            drawn = {grid: count for grid, count in drawn.items() if (grid[0] == 1) == images}
        if resolutions is None:
            return {grid: float(count) for grid, count in drawn.items()}
        counts: dict[Resolution, int] = defaultdict(int)
        for (_, H, W), count in drawn.items():
            counts[H, W] += count
        shares = {size: weight / counts[size] for size, weight in resolutions if counts[size]}
        return {grid: count * shares[grid[1:]] for grid, count in drawn.items() if grid[1:] in shares}

    def draw(
        self,
        generator: torch.Generator,
        size: int,
        frames: int | None = None,
        *,
        images: bool | None = None,
        resolutions: Iterable[tuple[Resolution, float]] | None = None,
    ) -> LatentBatch:
        """A batch of one grid; `frames` keeps the first latent frames only.

        images: draw samples of one frame (True) or of more (False) where there are some; None: all. resolutions: how
        often each is drawn, and no other; None: all. Within a resolution grids are weighted by their samples.
        """
        found = self.weights(images, resolutions)
        grids, weights = list(found), torch.tensor(list(found.values()))
        samples = self._grids[grids[int(torch.multinomial(weights, 1, generator=generator))]]
        chosen = [samples[int(i)] for i in torch.randint(len(samples), (size,), generator=generator)]
        latents = torch.stack([clip.latent[:frames] for clip in chosen])
        return LatentBatch(latents, [clip.caption for clip in chosen], [clip.name for clip in chosen])
