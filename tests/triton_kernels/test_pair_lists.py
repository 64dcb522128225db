"""The entries of two neighbouring query blocks, against lists merged by hand."""

import pytest
import torch
from block_masks import random_dense

from k5kernels import TokenLayout
from k5kernels.block_mask import dense_to_bits, row_offsets
from k5kernels.triton import pair_lists as kernels
from k5kernels.triton.pair_lists import FIRST_READS, SECOND_READS


def merged(first, second):
    """(entries, counts) of one pair."""
    both = sorted(first & second)
    alone = (sorted(first - second), sorted(second - first))
    entries = [key | FIRST_READS | SECOND_READS for key in both]
    for turn in range(max(map(len, alone))):
        entries += [key | FIRST_READS for key in alone[0][turn : turn + 1]]
        entries += [key | SECOND_READS for key in alone[1][turn : turn + 1]]
    return entries, [len(both), *map(len, alone)]


def assert_merged(dense):
    offsets = row_offsets(dense.sum(-1))
    entries, counts = kernels.bits_to_pairs(dense_to_bits(dense), offsets, int(dense.sum()))
    batch, heads, blocks, _ = dense.shape
    assert counts.shape == (batch, heads, -(-blocks // 2), 3)
    for sample in range(batch):
        for head in range(heads):
            rows = [set(row.nonzero().flatten().tolist()) for row in dense[sample, head]] + [set()]
            for first in range(0, blocks, 2):
                expected, numbers = merged(*rows[first : first + 2])
                start = int(offsets[sample, head, first])
                assert entries[start : start + len(expected)].tolist() == expected
                assert counts[sample, head, first // 2].tolist() == numbers


@pytest.mark.parametrize(("blocks", "density"), [(2, 0.5), (7, 0.4), (33, 0.3), (33, 1.0), (8, 0.0)])
def test_entries_are_the_union_with_its_readers_shared_ones_first(blocks, density, monkeypatch):
    monkeypatch.setattr(kernels, "LISTED_WORDS", 1)
    layout = TokenLayout((blocks, 1, 1), block_side=1)
    assert_merged(random_dense(layout, 1, 3, density))


def test_the_last_block_may_have_no_neighbour():
    assert_merged(torch.ones(2, 1, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize("empty", [0, 1])
def test_one_of_a_pair_may_read_nothing(empty):
    dense = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    dense[:, :, empty::2] = False
    assert_merged(dense)


def test_two_that_share_nothing_take_turns():
    dense = torch.zeros(1, 1, 2, 9, dtype=torch.bool)
    dense[0, 0, 0, 0::2] = True
    dense[0, 0, 1, 1:4:2] = True
    dense = torch.cat([dense, torch.zeros(1, 1, 7, 9, dtype=torch.bool)], 2)
    assert_merged(dense)
    entries, _ = kernels.bits_to_pairs(dense_to_bits(dense), row_offsets(dense.sum(-1)), 7)
    assert [entry & (FIRST_READS - 1) for entry in entries.tolist()] == [0, 1, 2, 3, 4, 6, 8]
