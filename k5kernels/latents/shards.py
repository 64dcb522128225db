"""Latent shards: tars of encoded clips, readable as a WebDataset (§6.1).

A sample `key` is two members, `key.safetensors` (a tensor `latent` [16, T, h, w], float16 or bfloat16, and what
further tensors the sample has) and `key.json` (the clip's record, see `k5kernels.latents.record`). Paths are local or
any URL that fsspec opens (s3://…, memory://…). The same samples give the same bytes.
"""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import fsspec
import torch
import webdataset
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from webdataset.tariterators import group_by_keys

from k5kernels.folder import naming, write_whole
from k5kernels.latents.record import ClipRecord, from_json, to_json
from k5kernels.vae.config import SPATIAL_STRIDE, VAEConfig, latent_frames

LATENT = "latent"
LATENT_CHANNELS = VAEConfig().latent_channels
DTYPES = (torch.float16, torch.bfloat16)
FURTHER_DTYPES = (*DTYPES, torch.float32, torch.uint8, torch.int32, torch.int64, torch.bool)
# A dot would end the key for WebDataset, and tar headers hold 100 bytes of name.
KEY = re.compile(r"[A-Za-z0-9-][A-Za-z0-9_-]{0,79}")
TENSOR_NAME = re.compile(r"[a-z][a-z0-9_]{0,79}")


class ShardError(ValueError):
    """A shard or a sample that is not as this module writes them; the message names it."""


@dataclass(frozen=True)
class Sample:
    """An encoded clip.

    key: unique in its shard. latent: [16, T, h, w], float16 or bfloat16. record: what is known of the clip.
    tensors: what else belongs to it, by name: a text embedding, its mask. Any shape, finite, of FURTHER_DTYPES.
    """

    key: str
    latent: Tensor
    record: ClipRecord
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class ShardWriter:
    """Writes one shard, which appears under its name when the `with` block ends well, and not at all otherwise.

    Samples are held in memory until then: shards are small, and object stores take them in one piece.
    bytes: size of the file, once it is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.bytes = path, 0
        self.keys: set[str] = set()
        self._bytes = io.BytesIO()
        self._tar = webdataset.TarWriter(self._bytes, encoder=False, mtime=0)

    def write(self, sample: Sample) -> None:
        """Add a sample; a float32 latent is stored as float16. Raises ShardError where it is not as in `Sample`."""
        latent = sample.latent.to(torch.float16) if sample.latent.dtype == torch.float32 else sample.latent
        tensors = {LATENT: latent, **sample.tensors}
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        where = f"{self.path}: {sample.key}"
        _check(sample.key, stored, sample.record, where)
        if LATENT in sample.tensors:
            raise ShardError(f"{where}: expected further tensors of other names, got {LATENT}")
        if sample.key in self.keys:
            raise ShardError(f"{where}: expected keys that occur once, got this one twice")
        try:
            text = to_json(sample.record)
        except ValueError as error:
            raise ShardError(f"{where}: {error}") from error
        self.keys.add(sample.key)
        self._tar.write({"__key__": sample.key, "json": text.encode(), "safetensors": save(stored)})

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is None:
            data = self._bytes.getvalue()
            write_whole(self.path, data)
            self.bytes = len(data)


def read_shard(path: str | Path) -> Iterator[Sample]:
    """The samples in the order in which they were written, one in memory at a time.

    Raises FileNotFoundError where there is no such file, ShardError where it is not a whole tar or a sample is not
    as `ShardWriter` writes it.
    """
    seen: set[str] = set()
    with naming(str(path)), fsspec.open(str(path), "rb") as file:
        try:
            for stored in group_by_keys(_members(file, str(path))):
                sample = _decode(stored, str(path))
                if sample.key in seen:
                    raise ShardError(f"{path}: {sample.key}: expected keys that occur once, found this one twice")
                seen.add(sample.key)
                yield sample
        except ShardError:
            raise
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ShardError(f"{path}: expected a whole tar, got one that cannot be read ({error})") from error


class _Header(tarfile.TarInfo):
    """A member's header. tarfile takes a damaged one, and a missing end mark, for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):  # the end mark
                raise
            raise tarfile.ReadError(f"{error} where a member or the end mark should be") from error


def _members(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    """The tar's files, as webdataset groups them. Raises TarError where the tar is damaged or not at its end."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
        for member in tar:
            opened = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if opened is not None:
                yield {"fname": member.name, "data": opened.read(), "__url__": path}
        assert tar.fileobj is not None
        while rest := tar.fileobj.read(tarfile.RECORDSIZE):
            if rest.strip(b"\0") or len(rest) % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("other data than blocks of zeros after the end mark")


def _decode(stored: dict[str, Any], path: str) -> Sample:
    key = stored["__key__"]
    where = f"{path}: {key}"
    for member in ("safetensors", "json"):
        if member not in stored:
            raise ShardError(f"{where}: expected a member {key}.{member}, found none")
    try:
        tensors = load(stored["safetensors"])
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ShardError(f"{where}: expected safetensors ({error})") from error
    try:
        record = from_json(stored["json"])
    except ValueError as error:
        raise ShardError(f"{where}: {error}") from error
    _check(key, tensors, record, where)
    return Sample(key, tensors.pop(LATENT), record, tensors)


def _check(key: str, tensors: Mapping[str, Tensor], record: ClipRecord, where: str) -> None:
    """What the writer and the reader ask of a sample."""
    if not KEY.fullmatch(key):
        raise ShardError(f"{where}: expected a key of up to 80 letters, digits, - and _")
    if LATENT not in tensors or not all(TENSOR_NAME.fullmatch(name) for name in tensors):
        names = "latent and others named in lower case, digits and _"
        raise ShardError(f"{where}: expected tensors {names}, got {sorted(tensors)}")
    latent, sides = tensors[LATENT], (record.height // SPATIAL_STRIDE, record.width // SPATIAL_STRIDE)
    expected = [LATENT_CHANNELS, latent_frames(record.frames), *sides]
    if list(latent.shape) != expected or latent.dtype not in DTYPES:
        raise ShardError(
            f"{where}: expected a latent {expected} (from its record) in float16 or bfloat16, "
            f"got {list(latent.shape)} in {latent.dtype}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in FURTHER_DTYPES:
            raise ShardError(f"{where}: expected {name} in one of {list(FURTHER_DTYPES)}, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ShardError(f"{where}: expected a finite {name}, got inf or nan")
