"""Attention over a mask of bits by the Triton kernels: to the bit that over the mask's lists."""

import pytest
import torch
from block_masks import random_mask
from dense_attention import random_tokens

from k5kernels import TokenLayout
from k5kernels.block_mask import dense_to_bits
from k5kernels.triton import bits_attention as kernels
from k5kernels.triton import block_sparse_attention as over_lists

SEVERAL = TokenLayout([(1, 5, 8), (1, 3, 3)], block_side=4)
SCALE = 0.2


@pytest.fixture(autouse=True)
def generation(monkeypatch):
    monkeypatch.setattr(over_lists, "generation_of", lambda device: 8)


@pytest.fixture(scope="module")
def mask():
    return random_mask(SEVERAL, 2, 3)


def results(forward, backward, *given):
    """out, lse and gradients, always of the same tokens."""
    q, k, v = random_tokens(SEVERAL, 2, 3, 16)
    grad_out = random_tokens(SEVERAL, 2, 3, 16, seed=1)[0]
    grad_lse = torch.randn(2, 3, SEVERAL.tokens, generator=torch.Generator().manual_seed(2))
    out, lse = forward(q, k, v, *given)
    return out, lse, *backward(grad_out, grad_lse, q, k, v, out, lse, *given)


BLOCKS = (SEVERAL.block_starts(), SEVERAL.max_block_tokens)


@pytest.fixture(scope="module")
def expected(mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(over_lists, "generation_of", lambda device: 8)
        functions = (over_lists.block_sparse_attention, over_lists.block_sparse_attention_backward)
        return results(*functions, mask.offsets, mask.indices, *BLOCKS, SCALE)


@pytest.mark.parametrize("heads_at_once", [2, 100])
def test_it_is_attention_over_the_lists_however_many_heads_are_listed_at_a_time(
    heads_at_once, mask, expected, monkeypatch
):
    entries = SEVERAL.blocks * SEVERAL.max_clip_blocks
    monkeypatch.setattr(kernels, "LISTED_ENTRIES", heads_at_once * entries)
    bits = (dense_to_bits(mask.to_dense()), mask.offsets, *BLOCKS, SEVERAL.max_clip_blocks, SCALE)
    for ours, theirs in zip(
        results(kernels.bits_attention, kernels.bits_attention_backward, *bits), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("heads", "blocks", "calls"), [(28, 1464, 1), (32, 3660, 7)], ids=["Lite 10 s", "Pro 10 s HD"])
def test_the_lists_of_the_longest_clips_take_no_more_than_a_quarter_of_a_gibibyte_at_a_time(heads, blocks, calls):
    q = torch.empty(2, heads, 64 * blocks, 8, device="meta")
    bits = torch.empty(2, heads, blocks, -(-blocks // 32), dtype=torch.int32, device="meta")
    found = list(kernels.parts(q, bits, blocks))
    assert len(found) == 2 * calls
    assert all(4 * capacity <= 1 << 28 for _, capacity in found)
    assert sum(capacity for _, capacity in found) == 2 * heads * blocks**2


def test_no_batch_is_no_launch():
    q = torch.zeros(0, 2, SEVERAL.tokens, 8)
    bits = torch.zeros(0, 2, SEVERAL.blocks, 1, dtype=torch.int32)
    assert not list(kernels.parts(q, bits, 3))
