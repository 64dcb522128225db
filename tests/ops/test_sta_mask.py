"""Sliding-Tile Attention: the blocks within half a window on each axis."""

from itertools import product

import pytest
import torch

from k5kernels import TokenLayout, sta_mask


def by_definition(clips: list[tuple[int, int, int]], window: tuple[int, int, int]) -> list[list[bool]]:
    """clips: grids in blocks."""
    blocks = [
        (number, *place) for number, grid in enumerate(clips) for place in product(*(range(side) for side in grid))
    ]
    reach = (0, *(side // 2 for side in window))
    return [
        [all(abs(a - b) <= r for a, b, r in zip(one, other, reach, strict=True)) for other in blocks] for one in blocks
    ]


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 3, 3), (11, 3, 3), (2, 4, 1), (1, 99, 99)])
@pytest.mark.parametrize("clips", [[(7, 3, 4)], [(1, 1, 1)], [(3, 2, 2), (1, 4, 1), (4, 1, 3)]])
def test_a_block_reads_those_within_half_a_window(clips, window):
    layout = TokenLayout([(T, H * 8 - 3, W * 8) for T, H, W in clips])
    mask = sta_mask(layout, window)
    assert mask.offsets.shape[:2] == (1, 1)
    assert mask.to_dense()[0, 0].tolist() == by_definition(clips, window)


def test_the_mask_does_not_depend_on_the_chunks_it_is_computed_in(monkeypatch):
    layout = TokenLayout([(3, 17, 20), (2, 8, 30)])
    whole = sta_mask(layout, (3, 3, 1))
    monkeypatch.setattr("k5kernels.ops.sta_mask.CHUNK", 50)
    parts = sta_mask(layout, (3, 3, 1))
    assert torch.equal(parts.offsets, whole.offsets)
    assert torch.equal(parts.indices, whole.indices)


def test_the_operator_passes_pytorchs_checks(device):
    coordinates = TokenLayout([(3, 17, 20), (2, 8, 30)]).block_coordinates(device)
    torch.library.opcheck(torch.ops.k5.sta_mask, (coordinates, [3, 3, 1]))


@pytest.mark.parametrize("window", [(3, 3), (3, 3, 0), (3, 3, 1.5)])
def test_a_window_that_is_no_three_positive_integers_is_refused(window):
    with pytest.raises(ValueError, match="three positive integers"):
        sta_mask(TokenLayout((1, 8, 8)), window)
