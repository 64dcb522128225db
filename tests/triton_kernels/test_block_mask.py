"""The other forms of a mask's lists by the Triton kernels."""

import pytest
import torch
from block_masks import random_mask

from k5kernels import TokenLayout
from k5kernels.triton import block_mask as kernels

SEVERAL = TokenLayout([(2, 9, 17), (1, 8, 20), (3, 5, 7)])
ROWS_OF_SEVERAL_WORDS = TokenLayout((150, 1, 1), block_side=1)


@pytest.mark.parametrize("layout", [SEVERAL, ROWS_OF_SEVERAL_WORDS], ids=["several clips", "150 blocks"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_transposed_lists_are_those_of_the_mask(layout, density):
    mask = random_mask(layout, 2, 3, density)
    offsets, indices = kernels.transposed_lists(mask.offsets, mask.indices)
    expected = mask.transpose()
    assert torch.equal(offsets, expected.offsets)
    assert torch.equal(indices, expected.indices)
