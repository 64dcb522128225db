"""Sliding-Tile Attention's lists by the Triton kernels against their definition."""

import pytest
import torch

from k5kernels import TokenLayout
from k5kernels.ops.sta_mask import kept_blocks, sta_mask_reference
from k5kernels.triton import sta_mask as kernels

GRIDS = [(1, 1, 1), (1, 8, 8), (3, 20, 36), [(2, 9, 17), (1, 8, 20), (13, 5, 7)]]


@pytest.mark.parametrize("window", [(11, 3, 3), (2, 5, 1), (99, 99, 99)])
@pytest.mark.parametrize("columns", [16, 1024])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_lists_are_those_of_the_definition(grid, columns, window, monkeypatch):
    monkeypatch.setattr(kernels, "COMPARED_BLOCKS", columns)
    layout = TokenLayout(grid)
    arguments = (layout.block_coordinates(), list(window), kept_blocks(layout, list(window)))
    ours, theirs = (function(*arguments) for function in (kernels.sta_mask, sta_mask_reference))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
