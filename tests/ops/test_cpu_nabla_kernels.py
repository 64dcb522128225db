"""The C++ kernels of NABLA attention against the references, with every instruction set they are built for."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from block_masks import (
    one_token_blocks,
    random_mask,
    same_clip,
    same_lists,
    select,
)
from dense_attention import masked_attention, random_tokens
from hypothesis import example, given
from hypothesis import strategies as st
from operator_checks import assert_accurate, assert_thread_count_changes_no_bit, outputs_and_gradients
from tolerances import assert_error_bounded, assert_matches

from k5kernels import BlockMask, TokenLayout, block_sparse_attention, nabla_mask
from k5kernels.ops import library
from k5kernels.ops.block_sparse_attention import (
    block_sparse_attention_backward_reference,
    block_sparse_attention_reference,
)
from k5kernels.ops.nabla_mask import nabla_mask_reference

pytestmark = pytest.mark.skipif(not library.NATIVE.exists(), reason="built without a C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]
RAGGED = TokenLayout([(2, 9, 17), (1, 8, 20)])
GRIDS = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=3)
INFINITY = float("inf")


def kernel_arguments(mask, layout, dim):
    return mask.offsets, mask.indices, layout.block_starts(), layout.max_block_tokens, 1 / math.sqrt(dim)


@pytest.mark.parametrize("name", ["block_sparse_attention", "block_sparse_attention_backward", "nabla_mask"])
def test_the_operator_runs_in_c_plus_plus(name):
    assert library.kernel_for(name, "cpu") == "C++"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 130, 256])
def test_attention_errs_as_little_as_dense_attention(isa, dim, dtype):
    mask = random_mask(RAGGED, 2, 3)
    assert_accurate(
        partial(block_sparse_attention, mask=mask, layout=RAGGED),
        partial(masked_attention, mask=mask, layout=RAGGED),
        random_tokens(RAGGED, 2, 3, dim, dtype=dtype),
        wanted=[0, 1, 2],
    )


@given(
    grids=GRIDS,
    block_side=st.integers(1, 11),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40)),
    shared=st.tuples(st.booleans(), st.booleans()),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@example([(1, 1, 1)], 8, (1, 1, 1), (False, False), 1.0, torch.float32, 0)  # one token
@example([(1, 8, 8)], 8, (2, 1, 64), (True, False), 1.0, torch.bfloat16, 0)  # one block
def test_any_layout_mask_and_head_dimension_meet_the_reference(
    isa, grids, block_side, sizes, shared, density, dtype, seed
):
    layout = TokenLayout(grids, block_side)
    batch, heads, dim = sizes
    random = torch.Generator().manual_seed(seed)
    shape = (1 if shared[0] else batch, 1 if shared[1] else heads, layout.blocks, layout.blocks)
    mask = BlockMask.from_dense((torch.rand(shape, generator=random) < density) & same_clip(layout), layout)
    rest = kernel_arguments(mask, layout, dim)
    tokens = random_tokens(layout, batch, heads, dim, seed, dtype=dtype)
    grad_out = torch.randn(tokens[0].shape, generator=random).to(dtype)
    grad_lse = torch.randn(tokens[0].shape[:3], generator=random)

    def forward_and_backward(forward, backward, cast):
        q_k_v = [cast(x) for x in tokens]
        out, lse = forward(*q_k_v, *rest)
        grads = backward(cast(grad_out), grad_lse.to(lse.dtype), *q_k_v, out, lse, *rest)
        return out, lse.nan_to_num(neginf=0.0), *grads

    references = (block_sparse_attention_reference, block_sparse_attention_backward_reference)
    operators = (torch.ops.k5_cpu.block_sparse_attention, torch.ops.k5_cpu.block_sparse_attention_backward)
    actual = forward_and_backward(*operators, lambda x: x)
    eager = forward_and_backward(*references, lambda x: x)
    exact = forward_and_backward(*references, lambda x: x.double())
    for one, other, truth in zip(actual, eager, exact, strict=True):
        assert_error_bounded(one, other, truth)


def test_small_weights_behind_a_large_one_are_not_lost(isa):
    tokens, weight = 4097, 2.0**-25  # less than half a unit in the last place of 1; 2^-13 in all
    k = torch.full((1, 1, tokens, 1), math.log(weight))
    k[:, :, 0] = 0
    v = (torch.arange(tokens) > 0).float().view(1, 1, tokens, 1)
    whole = torch.tensor([0, tokens])  # as one block
    lists = (torch.tensor([[[0, 1]]]), torch.zeros(1, dtype=torch.int32))
    out, lse = torch.ops.k5_cpu.block_sparse_attention(torch.ones_like(k), k, v, *lists, whole, tokens, 1.0)
    small = (tokens - 1) * weight
    lost = 64 * weight  # those that share a tile with the large one
    assert abs(lse[0, 0, 0].item() - math.log1p(small)) < lost + 3e-7
    assert abs(out[0, 0, 0, 0].item() - small / (1 + small)) < lost + 3e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("octaves", [1, 7, 9, 60])
def test_scores_that_rise_or_fall_from_block_to_block_err_as_little_as_dense_attention(isa, octaves, dim, dtype):
    layout, heads = TokenLayout((2, 16, 16)), 8  # enough tokens for the largest of their errors to be typical
    q, k, v = random_tokens(layout, 1, heads, dim)
    # In the last dimension: what follows so large a term in a sum is rounded by its size, and what follows is up to the
    # order of eager's product, which differs from processor to processor.
    q[..., -1] = 1.0
    q[..., ::2, -1] = -1.0  # neighbours in a tile: one rises, one falls
    block = torch.arange(layout.tokens) // 64
    k[..., -1] = octaves * math.log(2) * math.sqrt(dim) * block
    assert_accurate(
        partial(block_sparse_attention, mask=random_mask(layout, 1, heads), layout=layout),
        partial(masked_attention, mask=random_mask(layout, 1, heads), layout=layout),
        [x.to(dtype) for x in (q, k, v)],
        wanted=[0, 1, 2],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 20])
def test_tensors_of_any_strides_give_the_same_bits(isa, dim, dtype):
    mask = random_mask(RAGGED, 2, 3)
    tokens = random_tokens(RAGGED, 2, 3, dim, dtype=dtype)
    function = partial(block_sparse_attention, mask=mask, layout=RAGGED)
    expected = outputs_and_gradients(function, tokens, [0, 1, 2])
    sequence_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    fused = list(torch.stack(tokens, dim=-2).unbind(-2))
    no_unit_stride = [x.mT.contiguous().mT for x in tokens]
    for strided in (sequence_first, fused, no_unit_stride):
        for one, other in zip(outputs_and_gradients(function, strided, [0, 1, 2]), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_gradients_have_the_same_bits_however_threads_share_the_work(isa, set_threads, heads, dtype):
    """By shares of a head, by heads, or, where threads would wait for the last of these, by blocks."""
    mask = random_mask(RAGGED, 1, heads)
    tokens = random_tokens(RAGGED, 1, heads, 24, dtype=dtype)
    function = partial(block_sparse_attention, mask=mask, layout=RAGGED)
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(function, tokens, [0, 1, 2]), set_threads, thread_counts=(1, 2, 3, 4, 5)
    )


def test_an_expanded_gradient_is_read_as_it_is(isa):
    mask = random_mask(RAGGED, 1, 2)
    tokens = [x.requires_grad_() for x in random_tokens(RAGGED, 1, 2, 16)]
    out = block_sparse_attention(*tokens, mask, RAGGED)
    expanded = torch.autograd.grad(out, tokens, torch.ones(()).expand_as(out), retain_graph=True)
    for one, other in zip(expanded, torch.autograd.grad(out, tokens, torch.ones_like(out)), strict=True):
        assert torch.equal(one, other)


@given(
    name=st.sampled_from("qkv"),
    value=st.sampled_from([float("nan"), INFINITY, -INFINITY]),
    token=st.integers(0, RAGGED.tokens - 1),
    whole_row=st.booleans(),
)
def test_nan_and_infinity_reach_what_they_reach_in_the_reference(isa, name, value, token, whole_row):
    mask = random_mask(RAGGED, 1, 2)
    tokens = dict(zip("qkv", random_tokens(RAGGED, 1, 2, 16), strict=True))
    tokens[name][:, :, token, slice(None) if whole_row else 3] = value
    rest = kernel_arguments(mask, RAGGED, 16)
    actual = torch.ops.k5_cpu.block_sparse_attention(*tokens.values(), *rest)
    expected = block_sparse_attention_reference(*tokens.values(), *rest)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@given(
    name=st.sampled_from(["q", "k", "v", "grad_out"]),
    value=st.sampled_from([float("nan"), INFINITY, -INFINITY]),
    token=st.integers(0, RAGGED.tokens - 1),
    heads=st.integers(1, 2),
)
def test_nan_and_infinity_reach_the_gradients_they_reach_in_the_reference(isa, name, value, token, heads):
    mask = random_mask(RAGGED, 1, heads)
    tokens = dict(zip("qkv", random_tokens(RAGGED, 1, heads, 16), strict=True))
    arguments = {"grad_out": random_tokens(RAGGED, 1, heads, 16, seed=1)[0], "grad_lse": None, **tokens}
    arguments[name][:, :, token, 3] = value
    rest = kernel_arguments(mask, RAGGED, 16)
    saved = block_sparse_attention_reference(*tokens.values(), *rest)
    actual, expected = (
        function(*arguments.values(), *saved, *rest)
        for function in (
            torch.ops.k5_cpu.block_sparse_attention_backward,
            block_sparse_attention_backward_reference,
        )
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_scores_of_minus_infinity_weigh_nothing_and_alone_are_undefined(isa):
    layout = one_token_blocks(3)
    q = torch.ones(1, 1, 3, 1)
    k = torch.tensor([-INFINITY, 0.0, 0.0]).view(1, 1, 3, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1)
    reads = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    mask = BlockMask.from_dense(reads, layout)
    out, lse = torch.ops.k5_cpu.block_sparse_attention(q, k, v, *kernel_arguments(mask, layout, 1))
    assert_matches(out.flatten()[1:], torch.tensor([3.0, 0.0]))
    assert_matches(lse.flatten()[1:], torch.tensor([math.log(2), -INFINITY]))
    assert out[0, 0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    clips=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70)),
    spread=st.floats(0.1, 3),
    seed=st.integers(0, 999),
)
@example([1], (1, 1, 1), 1.0, 0)
def test_the_blocks_dropped_are_the_smallest_below_the_threshold(isa, dtype, clips, sizes, spread, seed):
    layout = one_token_blocks(*clips)
    batch, heads, dim = sizes
    q, k = (spread * x for x in random_tokens(layout, batch, heads, dim, seed, dtype=dtype)[:2])
    thr = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    kept = select(torch.ops.k5.nabla_mask, q, k, layout, thr).to_dense()
    assert not (kept & ~same_clip(layout)).any()
    for clip in (slice(*ends) for ends in pairwise(layout.clip_blocks)):
        logits = q[:, :, clip].double() @ k[:, :, clip].double().mT / math.sqrt(dim)
        probabilities, keeps = logits.softmax(-1), kept[:, :, clip, clip]
        dropped = probabilities.masked_fill(keeps, 0)
        smallest_kept = probabilities.masked_fill(~keeps, INFINITY).amin(-1)
        rounding = 1e-5 * max(1.0, logits.abs().max().item())
        assert (dropped.sum(-1) <= 1 - thr + rounding).all()
        assert (dropped.sum(-1) + smallest_kept >= 1 - thr - rounding).all()
        assert (dropped.amax(-1) <= smallest_kept * (1 + rounding)).all()


@pytest.mark.parametrize("window", [None, (5, 3, 1)])
@pytest.mark.parametrize("thr", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("layout", [one_token_blocks(1500), TokenLayout([(9, 20, 36), (3, 33, 17)])], ids=str)
def test_the_lists_are_those_of_sort_and_cumulative_sum(isa, layout, thr, window):
    q, k, _ = random_tokens(layout, 1, 2, 64)
    ours, theirs = (
        select(function, q, k, layout, thr, window).to_dense()
        for function in (torch.ops.k5_cpu.nabla_mask, nabla_mask_reference)
    )
    assert (ours != theirs).sum() <= 2  # logits differ in their last bits, which changes a selection once in a while


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_of_equal_blocks_as_many_are_kept_as_in_the_reference(isa, levels):
    layout = one_token_blocks(333)
    random = torch.Generator().manual_seed(levels)
    q = torch.ones(1, 2, layout.tokens, 1)
    k = torch.randint(levels, q.shape, generator=random).float()
    for thr in [0.0, 0.5, 1.0, *torch.rand(9, generator=random).tolist()]:
        ours, theirs = (
            select(function, q, k, layout, thr).to_dense()
            for function in (torch.ops.k5_cpu.nabla_mask, nabla_mask_reference)
        )
        assert torch.equal(ours.sum(-1), theirs.sum(-1))


@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("name", ["q", "k"])
def test_undefined_and_infinite_logits_keep_what_the_reference_keeps(isa, name, value):
    layout = one_token_blocks(37, 5, 70)
    q, k, _ = random_tokens(layout, 1, 2, 4)
    (q if name == "q" else k)[0, 1, [3, 39, 90], 2] = value
    ours, theirs = (
        select(function, q, k, layout, 0.7) for function in (torch.ops.k5_cpu.nabla_mask, nabla_mask_reference)
    )
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_threads_and_runs_change_no_list(isa, set_threads, dtype):
    q, k, _ = random_tokens(RAGGED, 2, 3, 20, dtype=dtype)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    expected = nabla_mask(q, k, RAGGED, 0.6, (3, 3, 3))
    for threads in (1, 2):
        set_threads(threads)
        for pair in ((q, k), strided, [x.mT.contiguous().mT for x in (q, k)]):
            mask = nabla_mask(*pair, RAGGED, 0.6, (3, 3, 3))
            assert same_lists(mask, expected)


def test_all_instruction_sets_keep_the_same_blocks(force_isa):
    best = torch.ops.k5_cpu.isa()
    layout = one_token_blocks(700)
    q, k, _ = random_tokens(layout, 1, 3, 48)
    masks = []
    for number in range(best + 1):
        assert force_isa(number)
        masks.append(select(torch.ops.k5.nabla_mask, q, k, layout, 0.8).to_dense())
    assert (masks[0] != masks[-1]).sum() <= 2
