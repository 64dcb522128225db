"""Packets to frames: each has its time, ends where the next begins, and damage and breaks are found."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from k5kernels.latents.video import VideoError
from k5kernels.latents.video.container import open_video
from k5kernels.latents.video.decoding import Decoded, decoded_frames
from tests.latents.video.containers import Container, number_of, write_container, write_joined


def decode(path: Path) -> list[Decoded]:
    with open_video(path) as video:
        return list(decoded_frames(video))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_frames_come_in_the_order_of_their_times_and_end_where_the_next_begins(tmp_path: Path, name: str) -> None:
    found = decode(write_container(tmp_path / name, Container(frames=9)))
    assert [number_of(one.frame.to_ndarray(format="rgb24")) for one in found] == list(range(9))
    assert all(one.end == after.start for one, after in pairwise(found))
    assert [one.begins_part for one in found] == [True] + [False] * 8
    assert [one.ends_stream for one in found] == [False] * 8 + [True]
    step = 1 / Container().rate
    assert found[0].start == 0
    assert float(found[-1].end) == pytest.approx(float(9 * step), abs=0.002)


def test_where_transport_streams_are_joined_a_part_begins_and_time_goes_on(tmp_path: Path) -> None:
    path = write_joined(tmp_path / "v.ts", [Container(frames=6, format="mpegts"), Container(frames=5, format="mpegts")])
    found = decode(path)
    assert [number for number, one in enumerate(found) if one.begins_part] == [0, 6]
    assert [one.start for one in found] == sorted({one.start for one in found})
    assert found[5].end == pytest.approx(found[5].start + Fraction(1) / Container().rate)


def test_a_file_that_is_cut_off_says_after_which_frame(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.mp4", Container(frames=9, muxing=(("movflags", "faststart"),)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VideoError, match=r"v\.mp4: expected a whole video, found damaged or missing data after"):
        decode(path)
