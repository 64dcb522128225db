"""Sliding-Tile Attention's lists for 10 seconds of Video Lite and of Video Pro HD, against the eager definition."""

import pytest
import torch

from bench.harness import compare
from k5kernels import TokenLayout, sta_mask
from k5kernels.ops.sta_mask import kept_blocks, sta_mask_reference

WINDOW = (11, 3, 3)


@pytest.mark.parametrize("grid", [(61, 32, 48), (61, 48, 80)], ids=["Lite 10 s", "Pro 10 s HD"])
def test_sta_mask(benchmark, grid):
    layout = TokenLayout(grid)
    coordinates = layout.block_coordinates()
    arguments = (coordinates, list(WINDOW), kept_blocks(layout, list(WINDOW)))
    distances = (coordinates[:, None] - coordinates).abs()
    exact = (distances <= torch.tensor([0, *(side // 2 for side in WINDOW)])).all(-1)

    def check(lists):
        offsets, indices = lists
        rows = torch.arange(layout.blocks).repeat_interleave(offsets[0, 0].diff())
        assert torch.equal(exact.nonzero(), torch.stack([rows, indices.long()], dim=1))

    def ours():
        mask = sta_mask(layout, WINDOW)
        return mask.offsets, mask.indices

    compare(
        benchmark,
        f"{layout.blocks} blocks, window {WINDOW}",
        {"ours": ours, "eager": lambda: sta_mask_reference(*arguments)},
        check,
    )
