"""What the shards of a folder were made from: the settings, the sources in the order of their arrival, the shards.

A manifest only grows: sources and shards are appended, and what was found of a source is filled in. Each such step is
a `Change`. To apply a change again, or a run of the last changes, does nothing.

Manifests and changes are JSON objects whose last entry is the sha256 of all bytes before it: one that lost its end,
or a single bit, is never taken for another.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

VERSION = 2
SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n')
SEAL_BYTES = len(',\n "sha256": ""\n}\n') + 64


class ManifestError(ValueError):
    """Text that is not as this library writes manifests and changes; the message says where."""


class OldManifestError(ManifestError):
    """A manifest from before manifests had a version."""


class NewerManifestError(ManifestError):
    """A manifest of a version that this library does not read yet."""


@dataclass(slots=True)
class SourceEntry:
    """A video or picture that was given.

    source: path below what was given. sha256: of its content; None until it was read. clips: how many of its clips are
    in shards. whole: no more will come of it. failure: why no more can come of it, where that is its content's fault.
    """

    source: str
    sha256: str | None = None
    clips: int = 0
    whole: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Clips of a source that follow each other in a shard. source: its number in the manifest."""

    source: int
    first_clip: int
    clips: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """bytes: size of the file. pieces: what is in it, in order."""

    bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a source after it was read, or in the midst of that: see `SourceEntry`."""

    source: int
    sha256: str
    whole: bool
    failure: str | None = None


@dataclass(frozen=True)
class Change:
    """A step of a job. arrived: (number of the first, sources) that one run adds. shards: by number in the part."""

    arrived: tuple[int, tuple[SourceEntry, ...]] | None = None
    shards: tuple[tuple[int, ShardEntry], ...] = ()
    outcomes: tuple[Outcome, ...] = ()


@dataclass
class Manifest:
    """batches: number of the first source of each run that added some; a shard never holds clips of two batches."""

    settings: dict[str, Any]
    sources: list[SourceEntry] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    shards: list[ShardEntry] = field(default_factory=list)

    def apply(self, change: Change) -> None:
        """Raises ManifestError where the change does not follow what is there."""
        if change.arrived is not None:
            self._arrive(*change.arrived)
        for number, shard in change.shards:
            self._put(number, shard)
        for outcome in change.outcomes:
            entry = self._source(outcome.source)
            entry.sha256, entry.whole, entry.failure = outcome.sha256, outcome.whole, outcome.failure

    def _arrive(self, first: int, entries: tuple[SourceEntry, ...]) -> None:
        if first + len(entries) <= len(self.sources) and first in self.batches:
            return
        if first != len(self.sources) or not entries:
            raise ManifestError(
                f"expected sources from number {len(self.sources)} on, got {len(entries)} from {first!r:.40}"
            )
        self.batches.append(first)
        self.sources.extend(SourceEntry(entry.source, entry.sha256) for entry in entries)

    def _put(self, number: int, shard: ShardEntry) -> None:
        if not 0 <= number <= len(self.shards):
            raise ManifestError(f"expected shard {len(self.shards)} next, got {number!r:.40}")
        if number == len(self.shards):
            for piece in shard.pieces:
                entry = self._source(piece.source)
                if piece.first_clip < 0 or piece.clips < 1:
                    raise ManifestError(f"expected clips in shard {number}, got {piece!r:.120}")
                entry.clips += piece.clips
            self.shards.append(shard)
        else:
            self.shards[number] = shard

    def _source(self, number: int) -> SourceEntry:
        if not 0 <= number < len(self.sources):
            raise ManifestError(f"expected one of {len(self.sources)} sources, got number {number!r:.40}")
        return self.sources[number]


def manifest_to_json(manifest: Manifest) -> bytes:
    """The same manifest gives the same bytes."""
    lists = {
        "sources": [_source_to_json(entry) for entry in manifest.sources],
        "shards": [_shard_to_json(shard) for shard in manifest.shards],
    }
    head = {"version": VERSION, "settings": manifest.settings, "batches": manifest.batches}
    parts = [f' "{name}": {json.dumps(value, sort_keys=True)}' for name, value in head.items()]
    for name, rows in lists.items():
        parts.append(f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" if rows else f' "{name}": []')
    return seal("{\n" + ",\n".join(parts))


def manifest_from_json(data: bytes) -> Manifest:
    """Raises ManifestError for anything but what `manifest_to_json` wrote in this version."""
    stored = _parse(data)
    if {"settings", "sources", "shards"} <= set(stored) and not {"version", "batches", "sha256"} & set(stored):
        raise OldManifestError("its manifest was written by an older k5kernels")
    version = stored.get("version")
    if type(version) is int and version > VERSION:
        got = f"got {version!r:.40}; go on with a newer k5kernels"
        raise NewerManifestError(f"expected at most version {VERSION}, {got}")
    _check_seal(data)
    if version != VERSION:
        raise ManifestError(f"expected a manifest of version {VERSION}, got {version!r:.40}")
    try:
        manifest = Manifest(dict(_typed(stored["settings"], dict)))
        sources = [_source_from_json(row) for row in _typed(stored["sources"], list)]
        batches = [_typed(first, int) for first in _typed(stored["batches"], list)]
        for first, end in zip(batches, [*batches, len(sources)][1:], strict=True):
            manifest.apply(Change(arrived=(first, tuple(sources[first:end]))))
        for number, row in enumerate(_typed(stored["shards"], list)):
            manifest.apply(Change(shards=((number, _shard_from_json(row)),)))
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"expected a manifest that k5 encode wrote ({error})") from error
    if len(sources) != len(manifest.sources):
        raise ManifestError(f"expected batches of all {len(sources)} sources, got {batches!s:.80}")
    for entry, source in zip(manifest.sources, sources, strict=True):
        if entry.clips != source.clips:
            raise ManifestError(
                f"expected {source.clips!r:.40} clips of {source.source!r:.80} in shards, found {entry.clips!r:.40}"
            )
        entry.whole, entry.failure = source.whole, source.failure
    return manifest


def change_to_json(number: int, change: Change) -> bytes:
    """number: of the change among those since the manifest was written."""
    stored: dict[str, Any] = {
        "number": number,
        "shards": [[number, _shard_to_json(shard)] for number, shard in change.shards],
        "outcomes": [[one.source, one.sha256, one.whole, one.failure] for one in change.outcomes],
    }
    if change.arrived is not None:
        first, entries = change.arrived
        stored["arrived"] = [first, [_source_to_json(entry) for entry in entries]]
    return seal(json.dumps(stored).removesuffix("}"))


def change_from_json(number: int, data: bytes) -> Change:
    """Raises ManifestError for anything but what `change_to_json` wrote under this number."""
    stored = _parse(data)
    _check_seal(data)
    if stored.get("number") != number:
        raise ManifestError(f"expected change {number}, got {stored.get('number')!r:.40}")
    try:
        shards = [(_typed(number, int), _shard_from_json(row)) for number, row in stored["shards"]]
        outcomes = [Outcome(*_typed_row(row, (int, str, bool), str)) for row in stored["outcomes"]]
        arrived = None
        if "arrived" in stored:
            first, rows = stored["arrived"]
            arrived = (_typed(first, int), tuple(_source_from_json(row) for row in rows))
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"expected a change that k5 encode wrote ({error})") from error
    return Change(arrived, tuple(shards), tuple(outcomes))


def seal(text: str) -> bytes:
    """The JSON object of this text, which lacks its end, with the sha256 of the text as its last entry."""
    data = text.encode()
    return data + f',\n "sha256": "{hashlib.sha256(data).hexdigest()}"\n}}\n'.encode()


def _check_seal(data: bytes) -> None:
    text, seal = data[:-SEAL_BYTES], SEAL.fullmatch(data[-SEAL_BYTES:])
    if seal is None:
        raise ManifestError("expected the sha256 of the rest at its end, found none")
    if seal[1].decode() != (sha256 := hashlib.sha256(text).hexdigest()):
        raise ManifestError(
            f"expected content of the sha256 at its end, {seal[1][:12].decode()}…, found {sha256[:12]}…"
        )


def _parse(data: bytes) -> dict[str, Any]:
    try:
        stored = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"expected JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ManifestError(f"expected a JSON object, got {type(stored).__name__}")
    return stored


def _source_to_json(entry: SourceEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in SourceEntry.__slots__}


def _source_from_json(row: dict[str, Any]) -> SourceEntry:
    values = [row[name] for name in SourceEntry.__slots__]
    source, sha256, clips, whole, failure = values
    optional_texts = (value for value in (sha256, failure) if value is not None)
    for value in (source, *optional_texts):
        _typed(value, str)
    return SourceEntry(source, sha256, _typed(clips, int), _typed(whole, bool), failure)


def _shard_to_json(shard: ShardEntry) -> dict[str, Any]:
    return {"bytes": shard.bytes, "pieces": [[one.source, one.first_clip, one.clips] for one in shard.pieces]}


def _shard_from_json(row: dict[str, Any]) -> ShardEntry:
    pieces = tuple(Piece(*_typed_row(one, (int, int, int))) for one in _typed(row["pieces"], list))
    return ShardEntry(_typed(row["bytes"], int), pieces)


def _typed_row(row: Any, kinds: Iterable[type], optional: type | None = None) -> list[Any]:
    """The values of a row of these types, and of an optional one at its end."""
    *values, last = _typed(row, list) if optional else [*_typed(row, list), None]
    if last is not None and type(last) is not optional:
        raise ValueError(f"expected {optional}, got {last!r:.80}")
    typed = [_typed(value, kind) for value, kind in zip(values, kinds, strict=True)]
    return [*typed, last] if optional else typed


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {value!r:.80}")
    return value
