"""Side data of frames, also of kinds that PyAV does not know."""

from pathlib import Path
from typing import Any

import av
import pytest
from av.sidedata.sidedata import Type

from k5kernels.latents.video import side_data as module
from k5kernels.latents.video.side_data import side_data
from tests.latents.video.containers import Container, write_container


def frame_of(path: Path) -> Any:
    with av.open(str(path)) as file:
        return next(file.decode(video=0))


def test_a_turned_videos_frames_have_its_matrix_and_others_have_none(tmp_path: Path) -> None:
    turned = frame_of(write_container(tmp_path / "turned.mp4", Container(frames=1, rotation=90)))
    plain = frame_of(write_container(tmp_path / "plain.mp4", Container(frames=1)))
    assert len(side_data(turned)[Type.DISPLAYMATRIX]) == 36
    assert Type.DISPLAYMATRIX not in side_data(plain)


def test_a_kind_that_pyav_does_not_know_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind before the matrix's is taken for one that is unknown: PyAV stops there, and it is deleted."""
    frame = frame_of(write_container(tmp_path / "turned.mp4", Container(frames=1, rotation=90)))
    expected = side_data(frame)

    class Unreadable:
        width, height, format = frame.width, frame.height, frame.format

        @property
        def side_data(self) -> Any:
            raise ValueError("99 is not a valid Type")

    monkeypatch.setattr(module, "_without_unknown", lambda unreadable: frame)
    assert side_data(Unreadable()) == expected
    monkeypatch.undo()
    cleaned = module._without_unknown(frame)
    assert {data.type: bytes(data) for data in cleaned.side_data} == expected
