"""Sliding-Tile Attention: the blocks within half a window on each axis."""

from itertools import product

import pytest
import torch

from k5kernels import TokenLayout, sta_mask
from k5kernels.ops.sta_mask import kept_blocks, sta_mask_reference


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
    dense = by_definition(clips, window)
    assert mask.to_dense()[0, 0].tolist() == dense
    assert kept_blocks(layout, list(window)) == sum(map(sum, dense))


@pytest.mark.parametrize("window", [(1, 1, 1), (11, 3, 3), (2, 5, 1), (1, 99, 99)])
@pytest.mark.parametrize("clips", [[(13, 33, 50)], [(1, 1, 1)], [(3, 17, 20), (1, 8, 30), (5, 40, 8)]])
def test_the_kernel_gives_the_lists_of_the_definition(clips, window, isa):
    layout = TokenLayout(clips)
    mask = sta_mask(layout, window)
    offsets, indices = sta_mask_reference(layout.block_coordinates(), list(window), mask.indices.shape[0])
    assert torch.equal(mask.offsets, offsets)
    assert torch.equal(mask.indices, indices)


def test_the_definition_does_not_depend_on_the_chunks_it_is_computed_in(monkeypatch):
    layout = TokenLayout([(3, 17, 20), (2, 8, 30)])
    arguments = (layout.block_coordinates(), [3, 3, 1], kept_blocks(layout, [3, 3, 1]))
    whole = sta_mask_reference(*arguments)
    monkeypatch.setattr("k5kernels.ops.sta_mask.CHUNK", 50)
    for part, once in zip(sta_mask_reference(*arguments), whole, strict=True):
        assert torch.equal(part, once)


def test_the_operator_passes_pytorchs_checks(device):
    layout = TokenLayout([(3, 17, 20), (2, 8, 30)])
    kept = kept_blocks(layout, [3, 3, 1])
    torch.library.opcheck(torch.ops.k5.sta_mask, (layout.block_coordinates(device), [3, 3, 1], kept))


@pytest.mark.parametrize("window", [(3, 3), (3, 3, 0), (3, 3, 1.5)])
def test_a_window_that_is_no_three_positive_integers_is_refused(window):
    with pytest.raises(ValueError, match="window: expected three positive integers"):
        sta_mask(TokenLayout((1, 8, 8)), window)
