"""What a shard says of each clip: a versioned record, stored as JSON beside the latent.

Version 1 has the fields of `ClipRecord`. Shards from before versions existed hold the first six alone and are read too.
A field may be added to `ClipRecord` with a default and without a new version: readers keep what they do not know in
`extra`. A new version is for a change that an old reader would misunderstand; it refuses such a record by name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

from k5kernels.vae.config import SPATIAL_STRIDE, latent_frames

VERSION = 1
UNVERSIONED = frozenset({"frames", "height", "width", "rate", "source", "first_frame"})
INTEGERS = ("frames", "height", "width", "first_frame", "shown_height", "shown_width")
FRACTIONS = ("rate", "start", "end")
TEXTS = ("source", "source_sha256", "caption", "colour")


@dataclass(frozen=True)
class ClipRecord:
    """What is known of an encoded clip. None: not known.

    frames, height, width: of the clip as it was encoded; frames is 1 + a multiple of 4, sides in pixels.
    rate: frames/s of these frames; None for a picture, which is one frame.
    source: path of the file below the folder that was given, with /. Bytes of a name that are no UTF-8 stand in it as
    `os.fsdecode` puts them.
    first_frame: number of the first frame among those taken of the source at `rate`.
    source_sha256: of the file's bytes, in hex. caption: what the clip shows.
    start, end: time of the first frame, and time at which the last one ends, in the source [s].
    shown_height, shown_width: pixels of the source as a player shows it, before it is cropped and resized.
    colour: the source's colour, in words.
    extra: fields this version of the library does not know, as JSON values; they are kept.
    Raises ValueError for values that do not fit.
    """

    frames: int
    height: int
    width: int
    rate: Fraction | None
    source: str
    first_frame: int
    source_sha256: str | None = None
    caption: str | None = None
    start: Fraction | None = None
    end: Fraction | None = None
    shown_height: int | None = None
    shown_width: int | None = None
    colour: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in ((n, k) for names, k in _KINDS for n in names):
            value = getattr(self, name)
            if type(value) is not kind and (value is not None or name in _REQUIRED):
                raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
        for name in ("caption", "colour"):
            _check_characters(name, getattr(self, name))
        latent_frames(self.frames)
        if min(self.height, self.width) < SPATIAL_STRIDE or self.first_frame < 0:
            got = f"{self.height}×{self.width} and first_frame {self.first_frame}"
            raise ValueError(f"expected sides of at least {SPATIAL_STRIDE} pixels and first_frame >= 0, got {got}")
        if (self.frames > 1) if self.rate is None else self.rate <= 0:
            raise ValueError(f"rate: expected a positive fraction of {self.frames} frames, got {self.rate}")
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ValueError(f"end: expected at least start, {self.start}, got {self.end}")
        if self.source_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.source_sha256):
            raise ValueError(f"source_sha256: expected 64 hexadecimal digits, got {self.source_sha256!r}")
        if overlap := sorted(_KNOWN & set(self.extra)):
            raise ValueError(f"extra: expected other fields than the record's own, got {overlap}")


def _check_characters(name: str, text: str | None) -> None:
    """JSON may hold half of a character, \\ud800 to \\udfff, which no tokenizer and no file in UTF-8 takes."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected characters, got half of one at position {error.start}") from None


_REQUIRED = UNVERSIONED - {"rate"}
_KNOWN = {one.name for one in fields(ClipRecord)} | {"version"}
_KINDS: tuple[tuple[tuple[str, ...], type], ...] = ((INTEGERS, int), (FRACTIONS, Fraction), (TEXTS, str))


def to_json(record: ClipRecord) -> str:
    """The record as JSON text in ASCII, equal for equal records. Raises ValueError where `extra` is no JSON."""
    known = {name: getattr(record, name) for names, _ in _KINDS for name in names}
    texts = {name: None if known[name] is None else str(known[name]) for name in FRACTIONS}
    try:
        return json.dumps({**record.extra, **known, **texts, "version": VERSION}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra: expected JSON values ({error})") from error


def from_json(text: str | bytes) -> ClipRecord:
    """The record that `to_json` wrote, in this version or an older one. Raises ValueError for anything else."""
    try:
        stored = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"expected a JSON object, got {type(stored).__name__}")
    version = stored.pop("version", 0)
    if type(version) is not int or version < 0:
        raise ValueError(f"version: expected a number, got {version!r}")
    if version > VERSION:
        raise ValueError(f"version: expected at most {VERSION}, got {version}; read it with a newer k5kernels")
    if missing := sorted(UNVERSIONED - set(stored)):
        raise ValueError(f"expected a record with the fields {sorted(UNVERSIONED)}, found no {', '.join(missing)}")
    extra = {name: stored.pop(name) for name in sorted(set(stored) - _KNOWN)}
    if version == 0 and (extra or set(stored) != UNVERSIONED):
        others = sorted({*extra, *stored} - UNVERSIONED)
        raise ValueError(f"expected the fields {sorted(UNVERSIONED)} and no others without a version, got {others}")
    if "extra" in stored:
        raise ValueError("expected fields beside each other, got one named extra")
    return ClipRecord(**stored | {name: _fraction(name, stored.get(name)) for name in FRACTIONS}, extra=extra)


def _fraction(name: str, text: object) -> Fraction | None:
    if text is None:
        return None
    try:
        if not isinstance(text, str):
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}: expected a fraction as text, got {text!r}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"got {name}, which JSON has no number for")
