"""Time stamps made whole."""

from fractions import Fraction

import pytest

from k5kernels.latents.video.timeline import Timeline

F = Fraction


@pytest.mark.parametrize(
    ("stamps", "joined", "expected"),
    [
        ([0, 1, 2], False, [(0, True), (1, False), (2, False)]),
        ([None, None, 5], False, [(0, True), (1, False), (5, False)]),
        ([7, None, None], False, [(7, True), (8, False), (9, False)]),
        ([4, 3, 5], False, [(4, True), (4, False), (5, False)]),
        ([90, 91, 0, 1], True, [(90, True), (91, False), (92, True), (93, False)]),
        ([0, 90, 91], False, [(0, True), (90, False), (91, False)]),
        ([0, 90, 91], True, [(0, True), (90, True), (91, False)]),
        ([0, 241], False, [(0, True), (241, True)]),
    ],
)
def test_frames_are_placed(stamps: list[int | None], joined: bool, expected: list[tuple[int, bool]]) -> None:
    """In 24ths of a second."""
    timeline = Timeline(F(1, 24), joined)
    placed = [timeline.place(None if stamp is None else F(stamp, 24)) for stamp in stamps]
    assert placed == [(F(time, 24), broken) for time, broken in expected]


@pytest.mark.parametrize(
    ("seconds", "announced", "joined", "broken"),
    [
        (45, 60, False, False),
        (45, 45, False, False),
        (45, 30, False, True),
        (45, 0, False, True),
        (45, 60, True, True),
        (3601, 4000, False, True),
    ],
)
def test_a_long_hole_is_a_pause_where_the_file_is_as_long_as_it_says(
    seconds: int, announced: int, joined: bool, broken: bool
) -> None:
    timeline = Timeline(F(1, 24), joined, F(announced))
    timeline.place(F(0))
    assert timeline.place(F(seconds)) == (seconds, broken)


def test_a_part_that_starts_anew_comes_after_the_former() -> None:
    timeline = Timeline(F(1, 24), may_be_joined=True)
    assert timeline.place(F(1)) == (1, True)
    assert timeline.place(F(1), new_part=True) == (F(25, 24), True)
    assert timeline.place(F(3, 2)) == (F(37, 24), False)


@pytest.mark.parametrize(
    ("before", "after", "joined", "jump"),
    [(0, 1, True, False), (10, 6, True, True), (10, 6, False, False), (0, 25, True, True), (0, 25, False, False)],
)
def test_jumps_between_packets(before: int, after: int, joined: bool, jump: bool) -> None:
    assert Timeline(F(1, 24), joined).is_jump(F(before, 24), F(after, 24)) is jump
