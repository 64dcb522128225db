"""BlockMask: compact lists that say the same as a dense mask over blocks, and as PyTorch's BlockMask."""

import pytest
import torch
from block_masks import random_dense, same_lists
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils import _pytree as pytree

from k5kernels import BlockMask, TokenLayout, sta_mask

RAGGED = TokenLayout([(2, 9, 17), (1, 8, 20)])
FULL = TokenLayout((3, 16, 8))


@given(st.integers(1, 3), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
def test_a_dense_mask_comes_back_from_the_lists(batch, heads, density, seed):
    dense = random_dense(RAGGED, batch, heads, density, seed)
    mask = BlockMask.from_dense(dense, RAGGED)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.indices.dtype == torch.int32
    assert mask.indices.shape == (dense.sum(),)


def test_a_row_lists_its_key_blocks_ascending_at_its_place_in_indices():
    dense = random_dense(RAGGED, 2, 3, 0.4)
    mask = BlockMask.from_dense(dense, RAGGED)
    for batch, head, row in [(0, 0, 1), (0, 2, 5), (1, 0, 3), (1, 2, RAGGED.blocks - 1)]:
        first, last = mask.offsets[batch, head, row : row + 2]
        assert mask.indices[first:last].tolist() == dense[batch, head, row].nonzero().flatten().tolist()


def test_a_mask_without_batch_and_heads_counts_for_all():
    dense = random_dense(RAGGED, 1, 1, 0.5)
    assert torch.equal(BlockMask.from_dense(dense[0, 0], RAGGED).to_dense(), dense)


def test_density_is_kept_blocks_over_possible_ones():
    dense = random_dense(RAGGED, 2, 3, 0.4)
    assert BlockMask.from_dense(dense, RAGGED).density == pytest.approx(dense.double().mean().item())


@given(st.floats(0, 1), st.integers(0, 99), st.sampled_from([(1, 1), (2, 2)]))
def test_the_transpose_lists_the_readers_of_each_key_block(density, seed, masks):
    dense = random_dense(RAGGED, *masks, density, seed)
    transposed = BlockMask.from_dense(dense, RAGGED).transpose()
    assert same_lists(transposed, BlockMask.from_dense(dense.mT, RAGGED))


def test_the_transpose_does_not_depend_on_the_chunks_it_is_made_in(monkeypatch):
    mask = BlockMask.from_dense(random_dense(RAGGED, 2, 3), RAGGED)
    whole = mask.transpose()
    for chunk in (1, 7, mask.indices.shape[0] - 1):
        monkeypatch.setattr("k5kernels.block_mask.CHUNK", chunk)
        assert same_lists(mask.transpose(), whole)


def test_the_image_of_a_head_is_its_mask():
    dense = random_dense(RAGGED, 2, 3, 0.4)
    image = BlockMask.from_dense(dense, RAGGED).image(1, 2)
    assert image.dtype == bool
    assert (image == dense[1, 2].numpy()).all()


def test_memory_is_four_bytes_a_kept_block_and_eight_a_row():
    mask = BlockMask.from_dense(random_dense(FULL, 2, 4, 0.5), FULL)
    assert mask.indices.nbytes == 4 * mask.to_dense().sum()
    assert mask.offsets.nbytes == 8 * 2 * 4 * (FULL.blocks + 1)


def test_with_its_transpose_a_mask_of_video_lites_length_takes_little_more_than_eight_bytes_a_kept_block():
    mask = sta_mask(TokenLayout((61, 32, 48)), (11, 5, 5))
    kept = int(mask.to_dense().sum())
    own = mask.indices.nbytes + mask.offsets.nbytes
    both = own + sum(x.nbytes for x in (mask.transpose().indices, mask.transpose().offsets))
    assert own <= 1.1 * 4 * kept
    assert both <= 2.2 * 4 * kept


def test_pytorchs_block_mask_says_the_same():
    dense = random_dense(FULL, 2, 3, 0.4)
    flex = BlockMask.from_dense(dense, FULL).to_flex()
    assert torch.equal(flex.to_dense().bool(), dense)
    assert flex.BLOCK_SIZE == (64, 64)
    assert flex.seq_lengths == (FULL.tokens, FULL.tokens)
    assert flex.kv_indices.data_ptr() != flex.full_kv_indices.data_ptr()
    assert torch.equal(BlockMask.from_flex(flex, FULL).to_dense(), dense)


def test_blocks_that_pytorch_lists_without_a_mask_function_are_whole():
    dense = random_dense(FULL, 1, 2, 0.4)
    counts = dense.sum(-1, dtype=torch.int32)
    indices = dense.int().argsort(dim=-1, descending=True, stable=True).int()
    flex = FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64)
    assert torch.equal(BlockMask.from_flex(flex, FULL).to_dense(), dense)


def test_blocks_read_in_part_are_refused():
    causal = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, FULL.tokens, FULL.tokens, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match="read in part"):
        BlockMask.from_flex(causal, FULL)


@pytest.mark.parametrize("lengths", [(FULL.tokens - 1, FULL.tokens), (FULL.tokens, FULL.tokens - 1)])
def test_a_mask_of_other_numbers_of_tokens_in_as_many_blocks_is_refused(lengths):
    every = create_block_mask(lambda b, h, q, k: q >= 0, 1, 1, *lengths, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match=f"expected one of {FULL.tokens} tokens"):
        BlockMask.from_flex(every, FULL)


def test_pytorchs_block_mask_needs_blocks_of_one_size():
    mask = BlockMask.from_dense(random_dense(RAGGED, 1, 1, 0.5), RAGGED)
    with pytest.raises(ValueError, match="multiple of 8"):
        mask.to_flex()
    flex = BlockMask.from_dense(random_dense(FULL, 1, 1, 0.5), FULL).to_flex()
    with pytest.raises(ValueError, match="multiple of 8"):
        BlockMask.from_flex(flex, RAGGED)
    with pytest.raises(ValueError, match="16×16 tokens"):
        BlockMask.from_flex(flex, TokenLayout((3, 16, 8), block_side=4))


def test_a_block_of_another_clip_is_refused():
    with pytest.raises(ValueError, match="another clip"):
        BlockMask.from_dense(torch.ones(RAGGED.blocks, RAGGED.blocks, dtype=torch.bool), RAGGED)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    mask = BlockMask.from_dense(random_dense(RAGGED, 1, 1, 0.5), RAGGED)
    with pytest.raises(ValueError, match="dense: expected a bool"):
        BlockMask.from_dense(mask.to_dense().float(), RAGGED)
    with pytest.raises(ValueError, match="dense: expected a bool"):
        BlockMask.from_dense(mask.to_dense(), FULL)
    with pytest.raises(ValueError, match="offsets: expected int64"):
        BlockMask(mask.offsets, mask.indices, FULL)
    with pytest.raises(ValueError, match="indices: expected int32"):
        BlockMask(mask.offsets, mask.indices.long(), RAGGED)


def test_the_mask_is_a_pytree_of_its_tensors_with_the_layout_as_structure():
    mask = BlockMask.from_dense(random_dense(RAGGED, 1, 2, 0.5), RAGGED)
    leaves, structure = pytree.tree_flatten(mask)
    assert [leaf is own for leaf, own in zip(leaves, (mask.offsets, mask.indices), strict=True)] == [True, True]
    again = pytree.tree_unflatten(leaves, structure)
    assert again.layout == RAGGED
    assert torch.equal(again.to_dense(), mask.to_dense())
