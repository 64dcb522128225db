"""Video files to latent shards: decode, nearest bucket, clips, VAE encoder (§6.1, §7.1).

A video is cut in clips of `clip_frames` frames. Of what remains at its end, the first 1 + 4n frames are one more,
shorter clip where there are at least 5; frames beyond that are dropped.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample, ShardWriter, write_whole
from k5kernels.latents.video import VideoError, decode, nearest_bucket, probe, to_model
from k5kernels.vae import HunyuanEncoder, latent_frames
from k5kernels.vae.config import TEMPORAL_STRIDE

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
# A clip has motion: more than the first latent frame, which stands for one frame alone.
MIN_FRAMES = 1 + TEMPORAL_STRIDE
MANIFEST = "manifest.json"
SHARD = re.compile(r"\d{5}\.tar(\.partial)?")

# Called after each clip: source, frames of it encoded so far, frames it announces (0 where it does not).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EncodeSummary:
    """What `encode_videos` left: shards and samples in the folder, shards kept from before, failures by source."""

    shards: int
    samples: int
    shards_kept: int
    failures: dict[str, str]


@dataclass
class _Source:
    """A video as the manifest knows it; whole: read to its end, or to where it broke."""

    source: str
    bytes: int
    modified_ns: int
    clips: int = 0
    failure: str | None = None
    whole: bool = False

    def is_same_file(self, other: "_Source") -> bool:
        return (self.source, self.bytes, self.modified_ns) == (other.source, other.bytes, other.modified_ns)


@dataclass
class _Manifest:
    """What the shards of a folder were made from. shards: bytes of each, in order."""

    settings: dict[str, Any]
    sources: list[_Source] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)


def encode_video(
    path: str | Path,
    encoder: HunyuanEncoder,
    *,
    resolution: int = 256,
    clip_frames: int = 25,
    progress: Progress | None = None,
) -> list[Sample]:
    """Latents [16, T, h, w], float16, of all clips of a video, one clip in memory at a time.

    resolution: a class of `k5kernels.latents.video.BUCKETS`; the bucket nearest to the video's aspect ratio is taken.
    clip_frames: 1 + a multiple of 4, at least 5.
    Raises VideoError where the video cannot be used or has fewer than 5 frames, ValueError for other arguments.
    """
    _check_clip_frames(clip_frames)
    return list(_encode_clips(str(path), encoder, resolution, clip_frames, 0, progress))


def encode_videos(
    paths: Iterable[str | Path],
    encoder: HunyuanEncoder,
    out: str | Path,
    *,
    resolution: int = 256,
    clip_frames: int = 25,
    samples_per_shard: int = 16,
    max_clips: int | None = None,
    progress: Progress | None = None,
) -> EncodeSummary:
    """Encode videos into shards `out/00000.tar`, …; `out` is a folder or an fsspec URL.

    paths: files, and folders that stand for the videos in them, sorted. A video that cannot be used is reported in
    the summary and the others are encoded; of one that breaks on its way, the clips before the break are kept.
    max_clips: of each video, the first so many; what follows them is not read.
    A second call goes on where the first ended: whole shards stay as long as encoder, settings and the videos up to
    them are the same (name, size, time of change), also those that failed; later shards are written anew.
    Raises ValueError for arguments that do not fit and for a folder with shards from elsewhere, OSError where
    `out` cannot be written.
    """
    _check_clip_frames(clip_frames)
    nearest_bucket(1, 1, resolution)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: expected at least 1, got {samples_per_shard}")
    if max_clips is not None and max_clips < 1:
        raise ValueError(f"max_clips: expected at least 1, or None for all, got {max_clips}")
    sources = [_identify(source) for source in find_videos(paths)]
    folder = _ShardFolder(out)
    settings = {"resolution": resolution, "clip_frames": clip_frames, "samples_per_shard": samples_per_shard}
    if max_clips is not None:
        settings["max_clips"] = max_clips
    manifest = folder.manifest(settings | {"encoder": _fingerprint(encoder)})
    kept, skip = _keep(manifest, sources, samples_per_shard, folder)
    known, manifest.sources, manifest.shards = manifest.sources, [], manifest.shards[:kept]
    folder.truncate(manifest)

    def clips(source: _Source, first: int) -> Iterator[Sample]:
        remaining = None if max_clips is None else max_clips - first
        return islice(_encode_clips(source.source, encoder, resolution, clip_frames, first, progress), remaining)

    stream = _stream(sources, known, skip, manifest, clips)
    while batch := list(islice(stream, samples_per_shard)):
        folder.add(manifest, batch)
    folder.save(manifest)
    failures = {source.source: source.failure for source in manifest.sources if source.failure is not None}
    samples = sum(source.clips for source in manifest.sources)
    return EncodeSummary(len(manifest.shards), samples, kept, failures)


def find_videos(paths: Iterable[str | Path]) -> list[str]:
    """Files as given, each once, and for a folder the files in it, at any depth, that are named like a video, sorted.

    Raises ValueError where that gives none.
    """
    found: dict[str, None] = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        found.update(dict.fromkeys(map(str, files)))
    if not found:
        raise ValueError(f"paths: expected video files or folders with some ({', '.join(SUFFIXES)}), found none")
    return list(found)


class _ShardFolder:
    """The folder of shards and its manifest."""

    def __init__(self, out: str | Path) -> None:
        self.files, self.root = fsspec.core.url_to_fs(str(out))
        self.out = str(out).rstrip("/")
        self.files.makedirs(self.root, exist_ok=True)

    def manifest(self, settings: dict[str, Any]) -> _Manifest:
        """The manifest that is there, if it was made with these settings, else an empty one."""
        path = f"{self.root}/{MANIFEST}"
        if not self.files.exists(path):
            if names := self._shards():
                raise ValueError(f"{self.out}: expected an empty folder or one with {MANIFEST}, found only {names[0]}")
            return _Manifest(settings)
        try:
            text = json.loads(self.files.cat_file(path))
            stored = _Manifest(text["settings"], [_Source(**source) for source in text["sources"]], text["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.out}/{MANIFEST}: expected one that `encode_videos` wrote ({error})") from error
        return stored if stored.settings == settings else _Manifest(settings)

    def size(self, index: int) -> int | None:
        """Bytes of a shard, None where it is missing."""
        path = f"{self.root}/{index:05d}.tar"
        return self.files.size(path) if self.files.exists(path) else None

    def truncate(self, manifest: _Manifest) -> None:
        """Remove the shards beyond the manifest's, after saying so in it."""
        self.save(manifest)
        for name in self._shards():
            if name.endswith(".partial") or int(name[:5]) >= len(manifest.shards):
                self.files.rm_file(f"{self.root}/{name}")

    def add(self, manifest: _Manifest, samples: list[Sample]) -> None:
        """Write the next shard, then the manifest that knows it."""
        index = len(manifest.shards)
        with ShardWriter(f"{self.out}/{index:05d}.tar") as shard:
            for sample in samples:
                shard.write(sample)
        manifest.shards.append(self.files.size(f"{self.root}/{index:05d}.tar"))
        self.save(manifest)

    def save(self, manifest: _Manifest) -> None:
        write_whole(f"{self.out}/{MANIFEST}", json.dumps(asdict(manifest), indent=1).encode())

    def _shards(self) -> list[str]:
        names = (path.rsplit("/", 1)[-1] for path in self.files.ls(self.root, detail=False))
        return sorted(name for name in names if SHARD.fullmatch(name))


def _keep(manifest: _Manifest, sources: list[_Source], per_shard: int, folder: _ShardFolder) -> tuple[int, int]:
    """(shards, samples in them) that are whole and made of the first of these sources."""
    same = 0
    while same < min(len(sources), len(manifest.sources)) and sources[same].is_same_file(manifest.sources[same]):
        same += 1
    samples = sum(source.clips for source in manifest.sources[:same])
    finished = same == len(sources) == len(manifest.sources) and all(source.whole for source in manifest.sources)
    # The last shard may hold fewer samples; it can only stay when nothing comes after it.
    shards = -(-samples // per_shard) if finished else samples // per_shard
    kept = 0
    while kept < min(shards, len(manifest.shards)) and folder.size(kept) == manifest.shards[kept]:
        kept += 1
    return kept, min(kept * per_shard, samples)


def _stream(
    sources: list[_Source],
    known: list[_Source],
    skip: int,
    manifest: _Manifest,
    clips: Callable[[_Source, int], Iterator[Sample]],
) -> Iterator[Sample]:
    """Samples after the first `skip`, while `manifest.sources` follows; `known`: what an earlier run found."""
    for index, source in enumerate(sources):
        before = known[index] if index < len(known) and known[index].is_same_file(source) else None
        if before is not None and before.whole and before.clips <= skip:
            manifest.sources.append(before)
            skip -= before.clips
            continue
        source.clips = min(skip, before.clips) if before is not None else 0
        skip -= source.clips
        manifest.sources.append(source)
        try:
            for sample in clips(source, source.clips):
                source.clips += 1
                yield sample
        except VideoError as error:
            source.failure = str(error)
        source.whole = True


def _encode_clips(
    path: str, encoder: HunyuanEncoder, resolution: int, clip_frames: int, first: int, progress: Progress | None
) -> Iterator[Sample]:
    """Samples of the clips from number `first` on."""
    info = probe(path)
    height, width = nearest_bucket(info.height, info.width, resolution)
    name = f"{re.sub('[^A-Za-z0-9-]+', '-', Path(path).stem)[:40]}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    frames = decode(path, height, width, min_frames=MIN_FRAMES)
    start = 0
    while len(clip := list(islice(frames, clip_frames))) >= MIN_FRAMES:
        count = len(clip) - (len(clip) - 1) % TEMPORAL_STRIDE
        if start >= first * clip_frames:
            latent = _encode(torch.stack(clip[:count]), encoder)
            record = ClipRecord(count, height, width, info.rate, source=path, first_frame=start)
            yield Sample(f"{name}-{start:08d}", latent, record)
        start += count
        if progress is not None:
            progress(path, start, info.frames)


def _encode(frames: Tensor, encoder: HunyuanEncoder) -> Tensor:
    """float16 latent [16, T, h, w] of uint8 frames [F, H, W, 3]."""
    weight = next(encoder.parameters())
    with torch.inference_mode():
        latent = encoder(to_model(frames).to(weight.device, weight.dtype))
    # Outside inference mode, so that the copy can be trained on.
    return latent[0].to("cpu", torch.float16, copy=True)


def _check_clip_frames(clip_frames: int) -> None:
    latent_frames(clip_frames)
    if clip_frames < MIN_FRAMES:
        raise ValueError(f"clip_frames: expected at least {MIN_FRAMES}, got {clip_frames}")


def _identify(source: str) -> _Source:
    """A missing file has size 0: it fails later, with the other videos that cannot be used."""
    try:
        status = os.stat(source)
    except OSError:
        return _Source(source, 0, 0)
    return _Source(source, status.st_size, status.st_mtime_ns)


def _fingerprint(encoder: HunyuanEncoder) -> str:
    """Hash of configuration and weights."""
    digest = hashlib.sha256(repr(encoder.config).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
