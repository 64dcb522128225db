"""The other forms of a mask's lists by the Triton kernels: bits, lists of bits, transposed lists."""

import pytest
import torch
from block_masks import random_mask

from k5kernels import TokenLayout
from k5kernels.block_mask import bits_to_dense, dense_to_bits
from k5kernels.triton import block_mask as kernels

SEVERAL = TokenLayout([(1, 9, 17), (1, 8, 10), (2, 3, 5)])
ROWS_OF_SEVERAL_WORDS = TokenLayout((150, 1, 1), block_side=1)


@pytest.mark.parametrize("layout", [SEVERAL, ROWS_OF_SEVERAL_WORDS], ids=["several clips", "150 blocks"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_transposed_lists_are_those_of_the_mask(layout, density):
    mask = random_mask(layout, *((2, 3) if layout is SEVERAL else (1, 1)), density)
    offsets, indices = kernels.transposed_lists(mask.offsets, mask.indices)
    expected = mask.transpose()
    assert torch.equal(offsets, expected.offsets)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize(("density", "words"), [(0.0, 16), (0.3, 2), (1.0, 16)])
def test_bits_are_those_of_the_lists_and_lists_those_of_the_bits(density, words, monkeypatch):
    monkeypatch.setattr(kernels, "LISTED_WORDS", words)
    mask = random_mask(ROWS_OF_SEVERAL_WORDS, 1, 1, density)
    bits = kernels.lists_to_bits(mask.offsets, mask.indices)
    assert torch.equal(bits, dense_to_bits(mask.to_dense()))
    assert torch.equal(bits_to_dense(bits), mask.to_dense())
    kept = mask.indices.shape[0]
    assert torch.equal(kernels.bits_to_lists(bits, mask.offsets, kept), mask.indices)
    longer = kernels.bits_to_lists(bits, mask.offsets, kept + 100)
    assert longer.shape == (kept + 100,)
    assert torch.equal(longer[:kept], mask.indices)
