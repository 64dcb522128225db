"""Latent shards: tars of encoded clips, readable as a WebDataset (§6.1).

A sample `key` is two members, `key.safetensors` (one tensor, `latent` [16, T, h, w], float16 or bfloat16) and
`key.json` (the clip's meta, see `Sample`). Paths are local or any URL that fsspec opens (s3://…, memory://…).
The same samples give the same bytes.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import fsspec
import torch
import webdataset
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from k5kernels.atomic import replacing
from k5kernels.vae.config import SPATIAL_STRIDE, VAEConfig, latent_frames

LATENT_CHANNELS = VAEConfig().latent_channels
DTYPES = (torch.float16, torch.bfloat16)
# A dot would end the key for WebDataset, and tar headers hold 100 bytes of name.
KEY = re.compile(r"[A-Za-z0-9-][A-Za-z0-9_-]{0,79}")
META_TYPES = {"frames": int, "height": int, "width": int, "rate": str, "source": str, "first_frame": int}


class ShardError(ValueError):
    """A shard or a sample that is not as this module writes them; the message names it."""


class Sample(NamedTuple):
    """An encoded clip.

    key: unique in its shard. latent: [16, T, h, w], float16 or bfloat16. meta: `frames`, `height`, `width` of the
    clip [pixels], `rate` [frames/s, a fraction as text: "30000/1001"], `source` (the file), `first_frame` in it.
    """

    key: str
    latent: Tensor
    meta: dict[str, Any]


class ShardWriter:
    """Writes one shard, which appears under its name when the `with` block ends well, and not at all otherwise.

    Samples are held in memory until then: shards are small, and object stores take them in one piece.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.keys: set[str] = set()
        self._bytes = io.BytesIO()
        self._tar = webdataset.TarWriter(self._bytes, encoder=False, mtime=0)

    def write(self, key: str, latent: Tensor, meta: dict[str, Any]) -> None:
        """Add a sample; a float32 latent is stored as float16. Raises ShardError where it is not as in `Sample`."""
        if latent.dtype == torch.float32:
            latent = latent.to(torch.float16)
        sample = Sample(key, latent.detach().cpu().contiguous(), meta)
        _check(sample, str(self.path))
        if not sample.latent.isfinite().all():
            raise ShardError(f"{self.path}: {key}: expected finite latents, got inf or nan")
        if key in self.keys:
            raise ShardError(f"{self.path}: {key}: expected keys that occur once, got this one twice")
        self.keys.add(key)
        text = json.dumps(meta, sort_keys=True).encode()
        self._tar.write({"__key__": key, "json": text, "safetensors": save({"latent": sample.latent})})

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is None:
            write_whole(self.path, self._bytes.getvalue())


def read_shard(path: str | Path) -> Iterator[Sample]:
    """The samples in the order in which they were written, one in memory at a time.

    Raises FileNotFoundError where there is no such file, ShardError where it is not a whole tar or a sample is not
    as `ShardWriter` writes it.
    """
    with fsspec.open(str(path), "rb") as file:
        members = tar_file_expander([{"url": str(path), "stream": file}])
        try:
            for stored in group_by_keys(members):
                yield _decode(stored, str(path))
        except (tarfile.TarError, EOFError) as error:
            raise ShardError(f"{path}: expected a whole tar, got one that cannot be read ({error.args[0]})") from error


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file that is never seen in part: renamed when whole on a local disk, one object elsewhere."""
    filesystem, inner = fsspec.core.url_to_fs(str(path))
    if isinstance(filesystem, LocalFileSystem):
        with replacing(inner) as partial:
            partial.write_bytes(data)
    else:
        filesystem.pipe_file(inner, data)


def _decode(stored: dict[str, Any], path: str) -> Sample:
    key = stored["__key__"]
    for member in ("safetensors", "json"):
        if member not in stored:
            raise ShardError(f"{path}: {key}: expected a member {key}.{member}, found none")
    try:
        tensors, meta = load(stored["safetensors"]), json.loads(stored["json"])
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: {key}: expected safetensors and JSON ({error})") from error
    if set(tensors) != {"latent"}:
        raise ShardError(f"{path}: {key}: expected one tensor, latent, got {sorted(tensors)}")
    sample = Sample(key, tensors["latent"], meta)
    _check(sample, path)
    return sample


def _check(sample: Sample, path: str) -> None:
    where = f"{path}: {sample.key}"
    if not KEY.fullmatch(sample.key):
        raise ShardError(f"{where}: expected a key of up to 80 letters, digits, - and _")
    _check_meta(sample.meta, where)
    latent, meta = sample.latent, sample.meta
    try:
        frames = latent_frames(meta["frames"])
    except ValueError as error:
        raise ShardError(f"{where}: {error}") from error
    sides = (meta["height"] // SPATIAL_STRIDE, meta["width"] // SPATIAL_STRIDE)
    expected = [LATENT_CHANNELS, frames, *sides]
    if list(latent.shape) != expected or latent.dtype not in DTYPES:
        raise ShardError(
            f"{where}: expected a latent {expected} (from its meta) in float16 or bfloat16, "
            f"got {list(latent.shape)} in {latent.dtype}"
        )


def _check_meta(meta: Any, where: str) -> None:
    if not isinstance(meta, dict) or set(meta) != set(META_TYPES):
        got = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
        raise ShardError(f"{where}: expected meta with the keys {sorted(META_TYPES)}, got {got}")
    for name, kind in META_TYPES.items():
        if type(meta[name]) is not kind:
            raise ShardError(f"{where}: meta {name}: expected {kind.__name__}, got {meta[name]!r}")
    if min(meta["height"], meta["width"]) < SPATIAL_STRIDE or meta["first_frame"] < 0:
        raise ShardError(f"{where}: meta: expected positive sides and first_frame >= 0, got {meta}")
    try:
        positive = Fraction(meta["rate"]) > 0
    except (ValueError, ZeroDivisionError):
        positive = False
    if not positive:
        raise ShardError(f"{where}: meta rate: expected a positive fraction as text, got {meta['rate']!r}")
