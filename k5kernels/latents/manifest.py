"""What the shards of a folder were made from: the settings, the sources in the order of their arrival, the shards.

A manifest only grows: sources and shards are appended, and what was found of a source is filled in. Each such step is
a `Change`. To apply a change again, or a run of the last changes, does nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

VERSION = 2


class ManifestError(ValueError):
    """Text that is no manifest of this library, or of a version it does not read; the message says which."""


class OldManifestError(ManifestError):
    """A manifest from before manifests had a version."""


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
    """A step of a job. arrived: (number of the first, sources) that one run adds. shards: by number."""

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
            raise ManifestError(f"expected sources from number {len(self.sources)} on, got {len(entries)} from {first}")
        self.batches.append(first)
        self.sources.extend(SourceEntry(entry.source, entry.sha256) for entry in entries)

    def _put(self, number: int, shard: ShardEntry) -> None:
        if number > len(self.shards):
            raise ManifestError(f"expected shard {len(self.shards)} next, got {number}")
        if number == len(self.shards):
            for piece in shard.pieces:
                entry = self._source(piece.source)
                if piece.first_clip < 0 or piece.clips < 1:
                    raise ManifestError(f"expected clips in shard {number}, got {piece}")
                entry.clips += piece.clips
            self.shards.append(shard)
        else:
            self.shards[number] = shard

    def _source(self, number: int) -> SourceEntry:
        if not 0 <= number < len(self.sources):
            raise ManifestError(f"expected one of {len(self.sources)} sources, got number {number}")
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
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def manifest_from_json(data: bytes) -> Manifest:
    """Raises ManifestError for anything but what `manifest_to_json` wrote in this version."""
    stored = _parse(data)
    if "version" not in stored and {"settings", "sources", "shards"} <= set(stored):
        raise OldManifestError("its manifest was written by an older k5kernels")
    version = stored.get("version")
    if type(version) is int and version > VERSION:
        raise ManifestError(f"expected at most version {VERSION}, got {version}; go on with a newer k5kernels")
    if version != VERSION:
        raise ManifestError(f"expected a manifest of version {VERSION}, got {version!r}")
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
        raise ManifestError(f"expected batches of all {len(sources)} sources, got {batches}")
    for entry, source in zip(manifest.sources, sources, strict=True):
        entry.whole, entry.failure = source.whole, source.failure
    return manifest


def change_to_json(change: Change) -> bytes:
    stored: dict[str, Any] = {
        "shards": [[number, _shard_to_json(shard)] for number, shard in change.shards],
        "outcomes": [[one.source, one.sha256, one.whole, one.failure] for one in change.outcomes],
    }
    if change.arrived is not None:
        first, entries = change.arrived
        stored["arrived"] = [first, [_source_to_json(entry) for entry in entries]]
    return json.dumps(stored).encode()


def change_from_json(data: bytes) -> Change:
    """Raises ManifestError for anything but what `change_to_json` wrote."""
    stored = _parse(data)
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
        raise ValueError(f"expected {optional}, got {last!r}")
    typed = [_typed(value, kind) for value, kind in zip(values, kinds, strict=True)]
    return [*typed, last] if optional else typed


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value
