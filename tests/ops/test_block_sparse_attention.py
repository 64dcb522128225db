"""Block-sparse attention: dense attention under the mask, with its gradients."""

import math
from functools import partial

import pytest
import torch
from block_masks import random_mask
from dense_attention import far_apart, masked_attention, over_tokens, random_tokens
from hypothesis import example, given
from hypothesis import strategies as st
from operator_checks import assert_accurate, assert_thread_count_changes_no_bit, outputs_and_gradients
from tolerances import assert_matches
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

from k5kernels import BlockMask, TokenLayout, block_sparse_attention
from k5kernels.ops import library

RAGGED = TokenLayout([(2, 9, 17), (1, 8, 20)])
FULL = TokenLayout((2, 8, 16))
SMALL = TokenLayout([(2, 3, 5), (1, 2, 4)], block_side=2)
GRIDS = st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6))


def operator(q, k, v, mask, layout, scale):
    blocks = (layout.block_starts(q.device), layout.max_block_tokens)
    return torch.ops.k5.block_sparse_attention(q, k, v, mask.offsets, mask.indices, *blocks, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("layout", [FULL, RAGGED], ids=["full", "ragged"])
def test_output_and_gradients_err_as_little_as_dense_attention(layout, dim, dtype, device):
    mask = random_mask(layout, 2, 3, device=device)
    tokens = random_tokens(layout, 2, 3, dim, dtype=dtype, device=device)
    assert_accurate(
        partial(block_sparse_attention, mask=mask, layout=layout),
        partial(masked_attention, mask=mask, layout=layout),
        tokens,
        wanted=[0, 1, 2],
    )


@given(
    st.lists(GRIDS, min_size=1, max_size=3),
    st.integers(1, 4),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9)),
    st.tuples(st.booleans(), st.booleans()),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
@example([(1, 1, 1)], 1, (1, 1, 1), (False, False), 1.0, torch.float32, 0)
def test_any_layout_and_mask_give_dense_attention(isa, grids, block_side, sizes, broadcast, density, dtype, seed):
    layout = TokenLayout(grids, block_side)
    batch, heads, dim = sizes
    dense = torch.rand(
        1 if broadcast[0] else batch,
        1 if broadcast[1] else heads,
        layout.blocks,
        layout.blocks,
        generator=torch.Generator().manual_seed(seed),
    )
    clip = layout.block_coordinates()[:, 0]
    mask = BlockMask.from_dense((dense < density) & (clip[:, None] == clip), layout)
    assert_accurate(
        partial(block_sparse_attention, mask=mask, layout=layout),
        partial(masked_attention, mask=mask, layout=layout),
        random_tokens(layout, batch, heads, dim, seed, dtype=dtype),
        wanted=[0, 1, 2],
    )


def test_a_row_that_reads_nothing_is_zero_with_gradients_of_zero(device):
    mask = BlockMask.from_dense(torch.zeros(1, 1, FULL.blocks, FULL.blocks, dtype=torch.bool, device=device), FULL)
    tokens = random_tokens(FULL, 1, 2, 8, device=device)
    for result in outputs_and_gradients(partial(block_sparse_attention, mask=mask, layout=FULL), tokens, [0, 1, 2]):
        assert not result.any()
    assert (operator(*tokens, mask, FULL, 1.0)[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_reads_nothing_is_zero_among_rows_that_read_infinity(dtype, set_threads):
    """A thread computes one after the other in the same memory."""
    set_threads(1)
    q, k, v = random_tokens(FULL, 1, 2, 64, dtype=dtype)
    kept = torch.eye(FULL.blocks, dtype=torch.bool).expand(1, 2, -1, -1).clone()
    kept[..., 2, 2] = False
    reads = over_tokens(kept, FULL).any(-1)
    out = block_sparse_attention(q, k, torch.full_like(v, torch.inf), BlockMask.from_dense(kept, FULL), FULL)
    assert not out[reads].isfinite().any()
    assert not out[~reads].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lse_is_the_logarithm_of_the_sum_of_exponentials(dtype, device):
    mask = random_mask(RAGGED, 2, 2, device=device)
    q, k, v = random_tokens(RAGGED, 2, 2, 16, dtype=dtype, device=device)
    _, lse = operator(q, k, v, mask, RAGGED, 0.3)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = 0.3 * (q.double() @ k.double().mT)
    expected = scores.masked_fill(~over_tokens(mask.to_dense(), RAGGED), -torch.inf).logsumexp(-1)
    assert_matches(lse, expected.to(lse.dtype))


def test_gradients_of_output_and_lse_are_those_of_finite_differences():
    mask = random_mask(SMALL, 1, 2)
    reads = over_tokens(mask.to_dense(), SMALL).any(-1)
    tokens = [x.requires_grad_() for x in random_tokens(SMALL, 1, 2, 2, dtype=torch.float64)]

    def both(q, k, v):
        out, lse = operator(q, k, v, mask, SMALL, 0.5)
        return out, lse[reads]

    assert torch.autograd.gradcheck(both, tokens)
    assert torch.autograd.gradcheck(lambda q, k, v: both(q, k, v)[1], [*tokens[:2], tokens[2].detach()])


def test_scale_multiplies_the_scores(device):
    mask = random_mask(FULL, 1, 2, device=device)
    q, k, v = random_tokens(FULL, 1, 2, 16, device=device)
    assert_matches(block_sparse_attention(q, k, v, mask, FULL, 0.1), masked_attention(q, k, v, mask, FULL, 0.1))
    default = block_sparse_attention(q, k, v, mask, FULL)
    assert torch.equal(block_sparse_attention(q, k, v, mask, FULL, 1 / math.sqrt(16)), default)


def test_storage_as_projections_leave_it_gives_the_same(device):
    mask = random_mask(RAGGED, 2, 3, device=device)
    tokens = random_tokens(RAGGED, 2, 3, 16, device=device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    function = partial(block_sparse_attention, mask=mask, layout=RAGGED)
    for one, other in zip(
        outputs_and_gradients(function, strided, [0, 1, 2]),
        outputs_and_gradients(function, tokens, [0, 1, 2]),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", [FULL, RAGGED], ids=["full", "ragged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_a_block_reach_the_rows_that_read_it_and_no_other(layout, value):
    mask = random_mask(layout, 1, 2, 0.4)
    q, k, v = random_tokens(layout, 1, 2, 8)
    clean = block_sparse_attention(q, k, v, mask, layout)
    token = int(layout.block_starts()[2])
    readers = over_tokens(mask.to_dense(), layout)[..., token]
    assert readers.any()
    assert not readers.all()
    v[:, :, token] = value
    out = block_sparse_attention(q, k, v, mask, layout)
    assert torch.equal(~out.isfinite().all(-1), readers)
    assert torch.equal(out[~readers], clean[~readers])
    k[:, :, token] = value
    out = block_sparse_attention(q, k, v, mask, layout)
    assert torch.equal(out.isnan().any(-1), masked_attention(q, k, v, mask, layout).isnan().any(-1) & readers)
    assert torch.equal(out[~readers], clean[~readers])


def test_the_reference_does_not_depend_on_the_chunks_it_computes_in(monkeypatch):
    mask = random_mask(RAGGED, 2, 3)
    tokens = random_tokens(RAGGED, 2, 3, 16, dtype=torch.float64)  # no kernel takes float64
    function = partial(block_sparse_attention, mask=mask, layout=RAGGED)
    whole = outputs_and_gradients(function, tokens, [0, 1, 2])
    monkeypatch.setattr("k5kernels.ops.block_sparse_attention.CHUNK", 1)
    for one, other in zip(outputs_and_gradients(function, tokens, [0, 1, 2]), whole, strict=True):
        assert_matches(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_further_apart_than_32_bits_count_are_found(dtype):
    layout = TokenLayout((1, 9, 8))
    mask = random_mask(layout, 1, 2, 1.0)
    function = partial(block_sparse_attention, mask=mask, layout=layout)
    tokens = random_tokens(layout, 1, 2, 64, dtype=dtype)
    apart = far_apart(tokens)
    assert apart[0].stride(2) * (layout.tokens - 1) > 2**31
    assert torch.equal(operator(*apart, mask, layout, 0.1)[1], operator(*tokens, mask, layout, 0.1)[1])
    results, expected = (outputs_and_gradients(function, inputs, [0, 1, 2]) for inputs in (apart, tokens))
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


def test_two_runs_and_two_thread_counts_give_the_same_bits(set_threads):
    mask = random_mask(RAGGED, 2, 3)
    tokens = random_tokens(RAGGED, 2, 3, 16)
    function = partial(block_sparse_attention, mask=mask, layout=RAGGED)
    assert_thread_count_changes_no_bit(lambda: outputs_and_gradients(function, tokens, [0, 1, 2]), set_threads)


def test_flex_attention_with_our_mask_gives_our_output():
    mask = random_mask(FULL, 1, 2)
    q, k, v = random_tokens(FULL, 1, 2, 16)
    flex = torch.compile(flex_attention)(q, k, v, block_mask=mask.to_flex())
    assert_matches(block_sparse_attention(q, k, v, mask, FULL), flex)


def test_with_a_mask_of_flex_attention_it_gives_flex_attentions_output():
    def every_other_block(batch, head, query, key):
        return (query // 64 + key // 64 + head) % 2 == 0

    theirs = create_block_mask(every_other_block, 1, 2, FULL.tokens, FULL.tokens, device="cpu", BLOCK_SIZE=64)
    q, k, v = random_tokens(FULL, 1, 2, 16)
    mask = BlockMask.from_flex(theirs, FULL)
    assert mask.density == 0.5
    flex = torch.compile(flex_attention)(q, k, v, block_mask=theirs)
    assert_matches(block_sparse_attention(q, k, v, mask, FULL), flex)


def copies_of_tokens(q, k, v, mask, layout):
    """The calls that copy a tensor of the shape of q, in a forward and backward."""
    tokens = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.ones_like(q)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        torch.autograd.grad(block_sparse_attention(*tokens, mask, layout), tokens, grad)
    copying = ("aten::clone", "aten::contiguous", "aten::copy_")
    return [event.name for event in recorded.events() if event.name in copying and [*q.shape] in event.input_shapes]


@pytest.mark.skipif(not library.NATIVE.exists(), reason="built without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_as_projections_leave_it_is_not_copied(dtype):
    mask = random_mask(RAGGED, 2, 3)
    tokens = random_tokens(RAGGED, 2, 3, 16, dtype=dtype)
    sequence_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    assert copies_of_tokens(*sequence_first, mask, RAGGED) == []
    heads_last = [x.mT.contiguous().mT for x in tokens]
    assert copies_of_tokens(*heads_last, mask, RAGGED) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_pytorchs_checks(dtype, device):
    mask = random_mask(SMALL, 2, 2, device=device)
    tokens = random_tokens(SMALL, 2, 2, 8, dtype=dtype, device=device)
    tokens = [x.requires_grad_() for x in tokens]
    rest = (mask.offsets, mask.indices, SMALL.block_starts(device), SMALL.max_block_tokens, 0.4)
    torch.library.opcheck(torch.ops.k5.block_sparse_attention, (*tokens, *rest))
    tokens = [x.detach() for x in tokens]
    out, lse = torch.ops.k5.block_sparse_attention(*tokens, *rest)
    for grad_lse in (None, lse.nan_to_num(0, 0, 0)):
        arguments = (torch.ones_like(out), grad_lse, *tokens, out, lse, *rest)
        torch.library.opcheck(torch.ops.k5.block_sparse_attention_backward, arguments)


def test_under_autocast_it_runs_in_autocasts_dtype_and_sums_in_float32():
    mask = random_mask(RAGGED, 1, 2)
    tokens = random_tokens(RAGGED, 1, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*tokens, mask, RAGGED)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, block_sparse_attention(*(x.bfloat16() for x in tokens), mask, RAGGED))


def test_under_autocast_float64_stays_what_it_is_as_in_dense_attention():
    mask = random_mask(RAGGED, 1, 2)
    tokens = random_tokens(RAGGED, 1, 2, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*tokens, mask, RAGGED)
        assert out.dtype == masked_attention(*tokens, mask, RAGGED).dtype == torch.float64
    assert torch.equal(out, block_sparse_attention(*tokens, mask, RAGGED))


def bad_lists(offsets, indices):
    """(what is wrong, offsets, indices): each would have a kernel read what is not there."""
    index, row = indices.numel() // 2, offsets.shape[2] // 2
    for value in (-1, SMALL.blocks, 2**31 - 1):
        yield "indices", offsets, indices.index_fill(0, torch.tensor([index]), value)
    beyond = torch.tensor([indices.numel() + 1])
    yield "offsets", offsets.index_copy(2, torch.tensor([row]), beyond.expand(1, 2, 1)), indices
    yield "offsets", offsets + 1, indices
    yield "offsets", offsets - 1, indices
    yield "offsets", offsets, indices[:-1]


# float64 runs on the reference.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_that_lists_what_is_not_there_is_refused(dtype):
    mask = random_mask(SMALL, 1, 2)
    tokens = random_tokens(SMALL, 1, 2, 8, dtype=dtype)
    good = (mask.offsets, mask.indices, SMALL.block_starts(), SMALL.max_block_tokens, 0.4)
    saved = torch.ops.k5.block_sparse_attention(*tokens, *good)
    for wrong, offsets, indices in bad_lists(mask.offsets, mask.indices):
        with pytest.raises(RuntimeError, match=f"mask: expected {wrong}"):
            block_sparse_attention(*tokens, BlockMask(offsets, indices, SMALL), SMALL)
        with pytest.raises(RuntimeError, match=f"mask: expected {wrong}"):
            torch.ops.k5.block_sparse_attention_backward(saved[0], None, *tokens, *saved, offsets, indices, *good[2:])


def test_what_does_not_fit_is_refused():
    mask = random_mask(RAGGED, 2, 3)
    q = torch.zeros(2, 3, RAGGED.tokens, 8)
    attend = partial(block_sparse_attention, layout=RAGGED)
    with pytest.raises(ValueError, match="q: expected a floating"):
        attend(q[:, :, 1:], q, q, mask)
    with pytest.raises(ValueError, match=r"k: expected torch\.float32"):
        attend(q, q.bfloat16(), q, mask)
    with pytest.raises(ValueError, match=r"v: expected torch\.float32"):
        attend(q, q, q[..., 1:], mask)
    with pytest.raises(ValueError, match="2 or 1 batches and 2 or 1 heads"):
        attend(q[:, :2], q[:, :2], q[:, :2], mask)
    with pytest.raises(ValueError, match="layout: expected that of the mask"):
        attend(q, q, q, random_mask(FULL, 2, 3))
    with pytest.raises(ValueError, match=rf"q: expected a floating \[B, h, {FULL.tokens}, D\]"):
        block_sparse_attention(q, q, q, random_mask(FULL, 2, 3))
