"""Tiles: every latent of every size comes from them, with weights that sum to one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.vae.tiling import (
    KANDINSKY_TILING,
    Span,
    Tiling,
    space_weights,
    spans_in_space,
    spans_in_time,
    time_weights,
)


def summed(spans: tuple[Span, ...], weights: list[list[float]]) -> list[float]:
    """What the weights of each latent of the axis sum to."""
    sums = [0.0] * spans[-1].stop
    for span, of_tile in zip(spans, weights, strict=True):
        assert len(of_tile) == span.stop - span.start
        for place, weight in enumerate(of_tile):
            sums[span.start + place] += weight
    return sums


@given(latents=st.integers(1, 70), n=st.integers(1, 5), strides=st.integers(1, 5), blend=st.booleans())
def test_tiles_in_time_give_every_latent(latents, n, strides, blend):
    frames = 1 + 4 * n
    tiling = Tiling(frames, 4 * max(min(strides, n), -(-(frames // 2) // 4)), blend)
    spans = spans_in_time(latents, tiling)
    weights = time_weights(spans, blend)
    assert summed(spans, weights) == pytest.approx([1.0] * latents)
    assert all(of_tile[0] == 0 for of_tile in weights[1:])  # made of one frame alone, not of four


@given(latents=st.integers(1, 200), tiles=st.integers(1, 6), overlap=st.integers(1, 8), blend=st.booleans())
def test_tiles_in_space_give_every_latent(latents, tiles, overlap, blend):
    try:
        spans = spans_in_space(latents, tiles, overlap)
    except ValueError:
        return
    assert len({span.stop - span.start for span in spans}) == 1
    assert summed(spans, space_weights(spans, blend)) == pytest.approx([1.0] * latents)


def test_the_default_repeats_one_frame_a_tile():
    spans = spans_in_time(31, Tiling())
    assert [span.frames() for span in spans[:2]] == [slice(0, 17), slice(16, 33)]
    assert sum(span.frames().stop - span.frames().start for span in spans) == 121 + len(spans) - 1


def test_kandinskys_tiles_fade_over_two_latents():
    spans = spans_in_time(9, KANDINSKY_TILING)
    assert [span.frames() for span in spans] == [slice(0, 17), slice(8, 25), slice(16, 33)]
    assert time_weights(spans, blend=True)[1] == [0.0, 0.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"frames": 16}, "frames: expected 5, 9, 13, … frames of a tile, got 16"),
        ({"stride": 6}, "stride: expected a multiple of 4 from half of a tile's 17 frames up to 16, got 6"),
        ({"stride": 20}, "stride: .* got 20"),
        ({"stride": 4}, "stride: .* got 4"),
        ({"overlap": 12}, "overlap: expected a positive multiple of 8 pixels, got 12"),
    ],
)
def test_tilings_that_leave_gaps_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        Tiling(**settings)
