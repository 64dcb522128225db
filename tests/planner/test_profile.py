"""Hardware profiles: the report's H100 by default, from a file when saved, never silently wrong."""

import json
from dataclasses import fields, replace

import pytest

from k5kernels.planner import H100, HardwareProfile, load_profile, save_profile


def test_the_default_has_the_reports_coefficients():
    assert (H100.tokenwise_ms, H100.attention_ms, H100.linear_ms) == (9, 14, 6)
    assert H100.memory_bytes == 80 * 2**30
    assert H100.speed == 1


def test_a_profile_comes_back_from_its_file(tmp_path):
    profile = replace(
        H100, name="half", tokenwise_ms=18, attention_ms=28, linear_ms=12, memory_bytes=24e9, gpus_per_node=4
    )
    save_profile(profile, tmp_path / "half.json")
    assert load_profile(tmp_path / "half.json") == profile
    assert profile.speed == 0.5


def test_fields_left_out_of_a_file_are_the_h100s(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "a", "memory_bytes": 1e10}')
    assert load_profile(tmp_path / "a.json") == replace(H100, name="a", memory_bytes=1e10)


@pytest.mark.parametrize("field", [field.name for field in fields(HardwareProfile) if field.name != "name"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "9", None, True])
def test_a_figure_that_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .* got {value!r}"):
        replace(H100, **{field: value})


def test_a_coefficient_may_be_zero_but_not_all():
    assert replace(H100, tokenwise_ms=0).speed == pytest.approx(29 / 20)
    with pytest.raises(ValueError, match="tokenwise_ms, attention_ms, linear_ms: expected one above 0"):
        replace(H100, tokenwise_ms=0, attention_ms=0, linear_ms=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "expected a hardware profile as JSON"),
        ("[1, 2]", "expected a JSON object with a name"),
        ('{"memory_bytes": 1}', "expected a JSON object with a name"),
        ('{"name": "a", "memory": 1}', "expected the fields name, tokenwise_ms, .* got memory$"),
        ('{"name": "a", "attention_ms": -1}', "attention_ms: expected"),
        ('{"name": ""}', "name: expected a text"),
    ],
)
def test_a_file_that_is_no_profile_says_which_and_what(tmp_path, text, words):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_profile(tmp_path / "bad.json")
    assert str(tmp_path / "bad.json") in str(caught.value)


def test_a_save_that_fails_leaves_the_former_profile(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    save_profile(H100, path)

    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError, match="no space"):
        save_profile(replace(H100, name="b"), path)
    assert load_profile(path) == H100
