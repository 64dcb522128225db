"""The other forms of a mask's lists by the Triton kernels."""

import pytest
import torch
from block_masks import random_mask

from k5kernels import BlockMask, TokenLayout
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


def merged_by_python(mask, batch, head, pair):
    """{key block: (first reads, second reads)} of two rows."""
    first, second = mask.to_dense()[batch, head, 2 * pair : 2 * pair + 2].tolist()
    return {key: (a, b) for key, (a, b) in enumerate(zip(first, second, strict=True)) if a or b}


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_merged_lists_say_who_reads_each_block(density):
    layout = TokenLayout((41, 1, 1), block_side=1)
    mask = random_mask(layout, 2, 2, density)
    entries, counts = kernels.paired_lists(mask.offsets, mask.indices)
    assert counts.shape == (2, 2, 20)
    merged_pairs = 0
    for batch, head, pair in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(20)).tolist():
        expected = merged_by_python(mask, batch, head, pair)
        start = mask.offsets[batch, head, 2 * pair]
        listed = mask.offsets[batch, head, 2 * pair + 2] - start
        worth_it = 4 * (2 * len(expected) - listed) <= listed
        count = counts[batch, head, pair].item()
        assert count == (len(expected) if worth_it else 0)
        found = [
            (entry & kernels.KEY_BLOCK.value, (bool(entry & 1 << 29), bool(entry & 1 << 30)))
            for entry in entries[start : start + count].tolist()
        ]
        assert found == list(expected.items())[:count]
        merged_pairs += count > 0
    assert (merged_pairs > 40) == (density == 0.9)


def test_equal_lists_are_always_merged_and_disjoint_ones_never():
    dense = torch.zeros(4, 4, dtype=torch.bool)
    dense[:2, 1:] = True
    dense[2, :2] = dense[3, 2:] = True
    mask = BlockMask.from_dense(dense, TokenLayout((4, 1, 1), block_side=1))
    entries, counts = kernels.paired_lists(mask.offsets, mask.indices)
    assert counts.tolist() == [[[3, 0]]]
    both = kernels.FIRST_READS.value | kernels.SECOND_READS.value
    assert entries[:3].tolist() == [1 | both, 2 | both, 3 | both]
