"""The record of a clip: what is written reads back, in this version, older ones and newer ones."""

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from k5kernels.latents.record import VERSION, ClipRecord, from_json, to_json

PLAIN = ClipRecord(5, 32, 48, Fraction(30000, 1001), "a b.mp4", first_frame=3)
FULL = replace(
    PLAIN,
    source="ca\udce9f/été.mp4",
    source_sha256="0123456789abcdef" * 4,
    caption="a rabbit",
    start=Fraction(1, 8),
    end=Fraction(1, 3),
    shown_height=480,
    shown_width=853,
    colour="BT.709, limited range",
)
OLD = {"frames": 5, "height": 32, "width": 48, "rate": "30000/1001", "source": "a b.mp4", "first_frame": 3}


def stored(**fields: Any) -> str:
    return json.dumps(json.loads(to_json(PLAIN)) | fields)


@pytest.mark.parametrize("record", [PLAIN, FULL, replace(PLAIN, frames=1, rate=None)])
def test_what_is_written_reads_back(record: ClipRecord) -> None:
    assert from_json(to_json(record)) == record


def test_every_field_is_written_under_its_name() -> None:
    written = json.loads(to_json(FULL))
    assert written["version"] == VERSION
    assert written["caption"] == "a rabbit"
    assert written["end"] == "1/3"
    assert json.loads(to_json(PLAIN))["caption"] is None


def test_equal_records_give_the_same_text() -> None:
    one = replace(PLAIN, extra={"a": 1, "b": 2})
    assert to_json(one) == to_json(replace(PLAIN, extra={"b": 2, "a": 1}))


def test_record_from_before_versions_is_read() -> None:
    assert from_json(json.dumps(OLD)) == PLAIN


def test_record_without_a_version_has_no_other_fields() -> None:
    with pytest.raises(ValueError, match=r"no others without a version, got \['prompt'\]"):
        from_json(json.dumps(OLD | {"prompt": "a rabbit"}))


def test_fields_of_a_later_library_are_kept() -> None:
    record = from_json(stored(mood={"calm": 0.5}))
    assert record == replace(PLAIN, extra={"mood": {"calm": 0.5}})
    assert json.loads(to_json(record)) == json.loads(stored(mood={"calm": 0.5}))


def test_newer_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="version: expected at most 1, got 2; read it with a newer k5kernels"):
        from_json(stored(version=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "1"}, "version: expected a number, got '1'"),
        ({"version": True}, "version: expected a number"),
        ({"rate": "fast"}, "rate: expected a fraction as text, got 'fast'"),
        ({"rate": "1/0"}, "rate: expected a fraction as text"),
        ({"rate": 25}, "rate: expected a fraction as text, got 25"),
        ({"height": "32"}, "height: expected int, got '32'"),
        ({"frames": None}, "frames: expected int, got None"),
        ({"extra": {}}, "got one named extra"),
        ({"caption": "a \ud800"}, "caption: expected characters, got half of one at position 2"),
        ({"colour": "\udc80"}, "colour: expected characters, got half of one at position 0"),
    ],
)
def test_text_that_is_no_record_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(stored(**fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"frames": NaN}', "[" * 100_000, "{}", b"\xff"])
def test_other_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        from_json(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 4}, r"expected 1 \+ a multiple of 4, got 4"),
        ({"frames": True}, "frames: expected int, got True"),
        ({"width": 0}, "expected sides of at least 8 pixels"),
        ({"first_frame": -1}, "first_frame >= 0"),
        ({"rate": None}, "rate: expected a positive fraction of 5 frames, got None"),
        ({"rate": Fraction(0)}, "rate: expected a positive fraction"),
        ({"caption": 3}, "caption: expected str, got 3"),
        ({"start": Fraction(2), "end": Fraction(1)}, "end: expected at least start, 2, got 1"),
        ({"source_sha256": "abc"}, "source_sha256: expected 64 hexadecimal digits"),
        ({"extra": {"caption": "x"}}, r"extra: expected other fields than the record's own, got \['caption'\]"),
    ],
)
def test_record_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **fields)
