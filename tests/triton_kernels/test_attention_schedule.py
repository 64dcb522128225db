"""Attention that goes through the blocks of a head in another order, or through its keys in ranges."""

import pytest
import torch
from block_masks import random_mask
from dense_attention import masked_attention, random_tokens
from tolerances import assert_error_bounded

from k5kernels import BlockMask, TokenLayout
from k5kernels.ops.block_sparse_attention import block_sparse_attention_reference
from k5kernels.triton import attention_schedule as schedules
from k5kernels.triton import block_sparse_attention as kernels
from k5kernels.triton.attention_schedule import Schedule

LAYOUT = TokenLayout([(1, 9, 10), (2, 3, 5)])
WHOLE = TokenLayout((1, 16, 24))
SCALE = 0.2

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


@pytest.fixture(autouse=True)
def generation(monkeypatch):
    monkeypatch.setattr(kernels, "generation_of", lambda device: 8)


def attend(tokens, mask, schedule=schedules.IN_ORDER, function=kernels.block_sparse_attention):
    sizes = (mask.layout.block_starts(), mask.layout.max_block_tokens, SCALE)
    rest = () if function is block_sparse_attention_reference else (schedule,)
    return function(*tokens, mask.offsets, mask.indices, *sizes, *rest)


@pytest.mark.parametrize("masks", [(1, 1), (1, 2)])
def test_long_lists_first_change_no_bit(masks):
    mask = random_mask(LAYOUT, *masks)
    tokens = random_tokens(LAYOUT, 1, 2, 16)
    for one, other in zip(attend(tokens, mask, Schedule(longest_first=True)), attend(tokens, mask), strict=True):
        assert torch.equal(one, other)
    order = schedules.order_of_blocks(mask.offsets, 1, 2)
    lengths = mask.offsets.diff(dim=-1).expand(1, 2, -1).gather(-1, order.long())
    assert (lengths.diff(dim=-1) <= 0).all()
    assert torch.equal(order.sort(dim=-1).values, torch.arange(LAYOUT.blocks, dtype=torch.int32).expand(1, 2, -1))


@pytest.mark.parametrize(("ranges", "layout", "dtype"), [(2, LAYOUT, torch.float32), (4, WHOLE, torch.bfloat16)])
def test_ranges_of_keys_add_up_to_all_of_them(ranges, layout, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1)  # a head at a time
    mask, tokens = random_mask(layout, 1, 2), random_tokens(layout, 1, 2, 16, dtype=dtype)
    schedule = Schedule(longest_first=True, key_ranges=ranges)
    out, lse = attend(tokens, mask, schedule)
    exact, exact_lse = attend([x.double() for x in tokens], mask, function=block_sparse_attention_reference)
    assert_error_bounded(out, masked_attention(*tokens, mask, layout, SCALE), exact)
    finite = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[finite].double() - exact_lse[finite]).abs().max() < 1e-4
    for one, other in zip((out, lse), attend(tokens, mask, schedule), strict=True):
        assert torch.equal(one, other)


def test_a_row_is_undefined_where_the_scores_of_all_its_ranges_are_minus_infinity():
    q, k, v = (x.abs() + 1 for x in random_tokens(WHOLE, 1, 1, 16))
    k[:, :, :192, 0] = -float("inf")  # the first three key blocks: the first of two ranges
    dense = torch.zeros(6, 6, dtype=torch.bool)
    dense[0, :2] = True  # scores of -inf alone
    dense[1, 1:5] = True  # and others in the second range
    dense[2, 4:] = True
    dense[4, 2:4] = True
    mask = BlockMask.from_dense(dense, WHOLE)
    out, lse = attend((q, k, v), mask, Schedule(key_ranges=2))
    expected, expected_lse = attend((q, k, v), mask, function=block_sparse_attention_reference)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_undefined_input_reaches_the_rows_that_it_reaches_without_ranges(name):
    tokens = dict(zip("qkv", random_tokens(WHOLE, 1, 1, 16), strict=True))
    tokens[name][0, 0, 3, 5] = float("nan")
    mask = random_mask(WHOLE, 1, 1)
    out, _ = attend(tokens.values(), mask, Schedule(key_ranges=3))
    expected, _ = attend(tokens.values(), mask, function=block_sparse_attention_reference)
    assert torch.equal(out.isnan(), expected.isnan())


def test_lists_are_split_where_the_ranges_begin():
    mask = random_mask(WHOLE, 2, 3)
    starts = schedules.split_lists(mask.offsets, mask.indices, 4)
    bounds = [0, 2, 3, 5, 6]  # of six key blocks
    dense = mask.to_dense()
    for number, bound in enumerate(bounds):
        assert torch.equal(starts[..., number], mask.offsets[..., :-1] + dense[..., :bound].sum(-1))


def test_a_range_fits_three_quarters_of_the_cache():
    h200 = 50 << 20
    assert schedules.ranges_in_cache(93_696, 64, 2, h200) == 1  # Lite 10 s: 24 MB
    assert schedules.ranges_in_cache(119_040, 128, 2, h200) == 2  # Pro 5 s HD: 61 MB
    assert schedules.ranges_in_cache(234_240, 128, 2, h200) == 4  # Pro 10 s HD: 120 MB
