"""NABLA's selection by the Triton kernels against its definition."""

from itertools import pairwise

import pytest
import torch
import triton.language as tl
from block_masks import one_token_blocks, same_clip, same_lists, select
from dense_attention import far_apart, random_tokens
from tolerances import assert_error_bounded

from k5kernels import TokenLayout
from k5kernels.ops.nabla_mask import nabla_mask_reference
from k5kernels.triton import nabla_mask as kernels

RAGGED = TokenLayout([(1, 9, 10), (2, 3, 5)])
SQUARE = TokenLayout((1, 16, 24))
INFINITY, NAN = float("inf"), float("nan")


# Rows that stand in no clip, and those of infinite input, come to NaN on the way; NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def short_tiles(request, monkeypatch):
    """Tiles of rows that short clips fill: a program of the interpreter costs the same whatever it computes."""
    if "shipped_tiles" not in request.fixturenames:
        monkeypatch.setattr(kernels, "TILE_ROWS", 32)


@pytest.fixture
def shipped_tiles():
    """Keeps the tiles as they are."""


def both(q, k, layout, thr, window=None):
    """The masks of the kernels and of the definition."""
    return tuple(select(function, q, k, layout, thr, window) for function in (kernels.nabla_mask, nabla_mask_reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [RAGGED, SQUARE], ids=["ragged", "square"])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_lists_are_those_of_sort_and_cumulative_sum(layout, dim, dtype):
    q, k, _ = random_tokens(layout, 2, 2, dim, dtype=dtype)
    assert same_lists(*both(q, k, layout, 0.7))


@pytest.mark.parametrize("window", [None, (5, 3, 1)])
@pytest.mark.parametrize("thr", [0.0, 1e-12, 0.5, 0.9, 1.0])
def test_every_thr_with_and_without_a_window(thr, window):
    layout = TokenLayout([(2, 12, 20), (1, 17, 9)])
    q, k, _ = random_tokens(layout, 1, 1, 20)
    ours, theirs = (mask.to_dense() for mask in both(q, k, layout, thr, window))
    assert torch.equal(ours, theirs)
    if thr == 1:
        assert torch.equal(ours, same_clip(layout).expand_as(ours))


@pytest.mark.usefixtures("shipped_tiles")
def test_lists_of_rows_of_several_hundred_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "SELECTED_CELLS", 1 << 14)  # fewer programs for the interpreter
    layout = one_token_blocks(20, 250)
    q, k, _ = random_tokens(layout, 1, 1, 16)
    ours, theirs = (mask.to_dense() for mask in both(q, k, layout, 0.9))
    assert (ours != theirs).sum() <= 2  # where logits differ in their last bit


def test_a_row_longer_than_a_tile_is_selected_alone(monkeypatch):
    q, k, _ = random_tokens(RAGGED, 1, 2, 8)
    monkeypatch.setattr(kernels, "SELECTED_CELLS", 16)
    monkeypatch.setattr(kernels, "TILE_ROWS", 16)
    assert kernels.whole_row_tile(RAGGED.max_clip_blocks)[1] == 1
    assert same_lists(*both(q, k, RAGGED, 0.7, (3, 3, 3)))


def test_the_mask_does_not_depend_on_the_chunks_it_is_computed_in(monkeypatch):
    q, k, _ = random_tokens(RAGGED, 2, 2, 8)
    whole = select(kernels.nabla_mask, q, k, RAGGED, 0.7, (3, 3, 3))
    for chunk in (1, 3 * kernels.TILE_ROWS * 16):
        monkeypatch.setattr(kernels, "CHUNK", chunk)
        assert same_lists(select(kernels.nabla_mask, q, k, RAGGED, 0.7, (3, 3, 3)), whole)


@pytest.mark.usefixtures("shipped_tiles")
@pytest.mark.parametrize(("heads", "blocks"), [(28, 1464), (32, 3660)], ids=["Lite 10 s", "Pro 10 s HD"])
def test_of_the_longest_clips_a_third_of_the_map_is_in_memory_at_most(heads, blocks):
    tiles, step = kernels.logits_at_once(heads * -(-blocks // kernels.TILE_ROWS), blocks)
    assert step >= blocks
    assert tiles * kernels.TILE_ROWS * step < heads * blocks**2 / 3


def test_pooled_parts_add_up_to_the_means_in_float32():
    x = random_tokens(RAGGED, 2, 2, 20)[0]
    parts = kernels.pool(x, RAGGED.block_starts(), RAGGED.max_block_tokens)
    assert (parts.dtype, parts.shape) == (torch.bfloat16, (3, 4, RAGGED.blocks, 20))
    starts = RAGGED.block_starts().tolist()
    means = torch.stack([x.double()[:, :, a:b].mean(2) for a, b in pairwise(starts)], 2)
    eager = torch.stack([x[:, :, a:b].mean(2) for a, b in pairwise(starts)], 2)
    assert_error_bounded(parts.float().sum(0).view(means.shape), eager, means)


@pytest.mark.parametrize("dim", [20, 128])
def test_logits_err_no_more_than_float32_products_of_float32_means(dim):
    layout = one_token_blocks(10, 40)
    tokens = [8 * x for x in random_tokens(layout, 1, 2, dim)[:2]]
    queries, keys = (kernels.pool(x, layout.block_starts(), 1) for x in tokens)
    rows = kernels.keys_of_rows(layout.clip_block_starts(), layout.blocks)
    logits = torch.full((2, 2 * kernels.TILE_ROWS, 48), torch.nan)
    columns = 32
    grid = (-(-layout.blocks // columns), 4)
    kernels.launch(
        kernels.logits_kernel, grid, queries, keys, *rows, logits, 0, 2, 2, layout.blocks, 48, 1.0,
        D=dim, ROWS=kernels.TILE_ROWS, COLUMNS=columns, DEPTH=kernels.TILE_DEPTH,
    )  # fmt: skip
    for first, last in ((0, 10), (10, 50)):
        clip = [x[0, :, first:last] for x in tokens]
        exact, eager = (a @ b.mT for a, b in ([x.double() for x in clip], clip))
        assert_error_bounded(logits[:, first:last, : last - first], eager, exact)
    assert logits[:, :10, 10:].isnan().all()


@pytest.mark.parametrize("thr", [0.7, 1 - 2**-22])
def test_rounded_sums_decide_nothing_that_exact_ones_would_not(thr, monkeypatch):
    layout = one_token_blocks(5, 23)
    q, k, _ = (3 * x for x in random_tokens(layout, 1, 1, 8))  # probabilities down to 1e-20
    k[:, :, 12:20] = k[:, :, 12:13]  # and equal ones
    expected = None
    for steps in (0, 16):
        monkeypatch.setattr(kernels, "COARSE_STEPS", tl.constexpr(steps))
        mask = select(kernels.nabla_mask, q, k, layout, thr)
        assert expected is None or same_lists(mask, expected)
        expected = mask


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_of_equal_blocks_as_many_are_kept_as_in_the_reference(levels):
    layout = one_token_blocks(21)
    random = torch.Generator().manual_seed(levels)
    q = torch.ones(1, 1, layout.tokens, 1)
    k = torch.randint(levels, q.shape, generator=random).float()
    for thr in [0.0, 1.0, torch.rand((), generator=random).item()]:
        ours, theirs = (mask.to_dense().sum(-1) for mask in both(q, k, layout, thr))
        assert torch.equal(ours, theirs)


def test_a_sum_that_is_the_dropped_mass_exactly_is_kept_too():
    layout = one_token_blocks(8)
    zeros = torch.zeros(1, 1, 8, 4)
    for thr, kept in [(0.0, 1), (0.125, 2), (0.5, 5), (0.75, 7), (1.0, 8)]:
        assert select(kernels.nabla_mask, zeros, zeros, layout, thr).to_dense().sum(-1).unique().tolist() == [kept]


def test_thr_one_keeps_blocks_of_probability_zero():
    layout = one_token_blocks(5)
    peaked = torch.eye(5)[None, None] * 100
    assert select(kernels.nabla_mask, peaked, peaked, layout, 1.0).to_dense().all()
    assert select(kernels.nabla_mask, peaked, peaked, layout, 0.9).to_dense()[0, 0].equal(torch.eye(5).bool())


def test_the_dropped_mass_is_the_least_sum_that_rounds_to_it():
    one = 1 << kernels.FIXED_POINT_BITS
    for thr in (0.0, 0.1, 0.37, 0.5, 0.9, 1 - 2**-20):
        target = torch.tensor(1 - thr, dtype=torch.float32)
        least = kernels.dropped_mass(thr)
        sums = torch.tensor([(least + (1 << 10)) / one, (least - (1 << 10)) / one], dtype=torch.float64)
        assert (sums.float() >= target).tolist() == [True, False]
    assert kernels.dropped_mass(1.0) == 0


@pytest.mark.parametrize("value", [NAN, -NAN, INFINITY, -INFINITY])  # the bits of NaN have a sign too
@pytest.mark.parametrize("name", ["q", "k"])
def test_undefined_and_infinite_logits_keep_what_the_reference_keeps(name, value):
    layout = one_token_blocks(11, 3, 5)
    q, k, _ = random_tokens(layout, 1, 2, 4)
    (q if name == "q" else k)[0, 1, [3, 12, 16], 2] = value
    for thr in (0.0, 0.7):
        assert same_lists(*both(q, k, layout, thr))


def test_strides_and_runs_change_no_list():
    q, k, _ = random_tokens(RAGGED, 2, 1, 20)
    expected = select(kernels.nabla_mask, q, k, RAGGED, 0.6, (3, 3, 3))
    sequence_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    no_unit_stride = [x.mT.contiguous().mT for x in (q, k)]
    for pair in (sequence_first, no_unit_stride):
        assert same_lists(select(kernels.nabla_mask, *pair, RAGGED, 0.6, (3, 3, 3)), expected)


def test_tokens_further_apart_than_32_bits_count_are_found():
    layout = TokenLayout((1, 9, 8))
    q, k, _ = random_tokens(layout, 1, 2, 64, dtype=torch.bfloat16)
    assert same_lists(
        select(kernels.nabla_mask, *far_apart([q, k]), layout, 0.7), select(kernels.nabla_mask, q, k, layout, 0.7)
    )


def test_one_block_one_token_and_no_batch():
    one = torch.ones(1, 1, 1, 4)
    layout = TokenLayout((1, 1, 1))
    assert select(kernels.nabla_mask, one, one, layout, 0.5).to_dense().tolist() == [[[[True]]]]
    assert select(kernels.nabla_mask, one[:0], one[:0], layout, 0.5).indices.numel() == 0
    layout = TokenLayout((1, 8, 7))
    q, k, _ = random_tokens(layout, 2, 1, 64)
    assert select(kernels.nabla_mask, q, k, layout, 0.9).to_dense().all()
