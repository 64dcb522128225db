"""Attention and its gradients by the Triton kernels against the definition, at the precision of eager PyTorch."""

import pytest
import torch
from block_masks import random_mask
from dense_attention import far_apart, masked_attention, over_tokens, random_tokens
from tolerances import assert_error_bounded

from k5kernels import BlockMask, TokenLayout
from k5kernels.ops.block_sparse_attention import (
    block_sparse_attention_backward_reference,
    block_sparse_attention_reference,
)
from k5kernels.triton import block_sparse_attention as kernels

# A program of the interpreter takes as long as a kernel: four to six blocks, with lists of several.
FULL = TokenLayout((1, 16, 16))
RAGGED = TokenLayout([(1, 9, 10), (2, 3, 5)])
TWO = TokenLayout((1, 8, 16))  # of float32, whose blocks are up to four tiles
ONE = TokenLayout((1, 8, 8))
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# Layout, head dimension, dtype, and the compute capability as on which they are launched: from 9 on full blocks come
# by tensor descriptors.
CASES = [
    pytest.param(layout, dim, dtype, generation, id=f"{name}-{dim}-{dtype}-{generation}".replace("torch.", ""))
    for layout, name, dim, dtype, generation in (
        (FULL, "full", 64, BF16, 8),
        (FULL, "full", 64, BF16, 12),
        (FULL, "full", 80, BF16, 10),
        (FULL, "full", 128, BF16, 8),
        (FULL, "full", 128, BF16, 9),
        (FULL, "full", 128, BF16, 10),
        (FULL, "full", 64, HALF, 9),
        (TWO, "two blocks", 64, FLOAT, 8),
        (TWO, "two blocks", 128, FLOAT, 10),
        (ONE, "one block", 64, BF16, 10),
        (RAGGED, "ragged", 64, BF16, 8),
        (RAGGED, "ragged", 128, HALF, 10),
        (RAGGED, "ragged", 64, FLOAT, 8),
    )
]
SCALE = 0.2

# Rows whose scores are all -inf come to NaN, as in the definition; NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


@pytest.fixture(autouse=True)
def generation(request, monkeypatch):
    """The compute capability (major) as on which the test is launched, 8 where it does not say."""
    wanted = getattr(request, "param", 8)
    monkeypatch.setattr(kernels, "generation_of", lambda device: wanted)


def some_mask(layout, batch, heads):
    """`random_mask`, whose row 1 reads nothing; of two blocks or one all but, of the first head, the last pair."""
    if layout.blocks > 2:
        return random_mask(layout, batch, heads)
    dense = torch.ones(batch, heads, layout.blocks, layout.blocks, dtype=torch.bool)
    dense[:, 0, -1, -1] = layout.blocks == 1
    return BlockMask.from_dense(dense, layout)


def forward(function, q, k, v, mask, layout, scale=SCALE):
    return function(q, k, v, mask.offsets, mask.indices, layout.block_starts(), layout.max_block_tokens, scale)


def assert_forward(layout, mask, tokens):
    """Output and lse err no more than those of eager PyTorch."""
    q, k, v = tokens
    out, lse = forward(kernels.block_sparse_attention, q, k, v, mask, layout)
    exact, exact_lse = forward(block_sparse_attention_reference, *(x.double() for x in tokens), mask, layout)
    assert_error_bounded(out, masked_attention(q, k, v, mask, layout, SCALE), exact)
    finite = exact_lse.isfinite()
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[finite].double() - exact_lse[finite]).abs().max() < 1e-4


@pytest.mark.parametrize(("layout", "dim", "dtype", "generation"), CASES, indirect=["generation"])
def test_forward_is_as_near_to_float64_as_eager_attention(layout, dim, dtype):
    assert_forward(layout, some_mask(layout, 1, 2), random_tokens(layout, 1, 2, dim, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1)])
def test_a_mask_may_serve_all_samples_or_heads(shape):
    assert_forward(FULL, some_mask(FULL, *shape), random_tokens(FULL, 2, 3, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("dim", [1, 20])
def test_other_head_dims(dim):
    assert_forward(RAGGED, random_mask(RAGGED, 1, 1), random_tokens(RAGGED, 1, 1, dim))


@pytest.mark.parametrize("block_side", [1, 3, 9])
def test_other_block_sides(block_side):
    P = block_side
    layout = TokenLayout([(1, 2 * P, P), (1, P + 2, P)], P)
    assert_forward(layout, random_mask(layout, 1, 2), random_tokens(layout, 1, 2, 16))


def gradients(function, tokens, mask, layout, grad_out, grad_lse, forward_function):
    q, k, v = tokens
    out, lse = forward(forward_function, q, k, v, mask, layout)
    lists = (mask.offsets, mask.indices, layout.block_starts(), layout.max_block_tokens)
    return function(grad_out, grad_lse, q, k, v, out, lse, *lists, SCALE)


def eager_gradients(tokens, mask, layout, grad_out):
    leaves = [x.clone().requires_grad_() for x in tokens]
    return torch.autograd.grad(masked_attention(*leaves, mask, layout, SCALE), leaves, grad_out)


@pytest.mark.parametrize(("layout", "dim", "dtype", "generation"), CASES, indirect=["generation"])
def test_gradients_are_as_near_to_float64_as_those_of_eager_attention(layout, dim, dtype):
    tokens = random_tokens(layout, 1, 2, dim, dtype=dtype)
    mask = some_mask(layout, 1, 2)
    grad_out = random_tokens(layout, 1, 2, dim, seed=1, dtype=dtype)[0]
    ours = gradients(
        kernels.block_sparse_attention_backward, tokens, mask, layout, grad_out, None, kernels.block_sparse_attention
    )
    exact = gradients(
        block_sparse_attention_backward_reference, [x.double() for x in tokens], mask, layout, grad_out.double(), None,
        block_sparse_attention_reference,
    )  # fmt: skip
    for mine, eager, truth in zip(ours, eager_gradients(tokens, mask, layout, grad_out), exact, strict=True):
        assert_error_bounded(mine, eager, truth)


@pytest.mark.parametrize("block_side", [1, 3, 9])
def test_gradients_of_other_block_sides_and_of_the_log_sum(block_side):
    P = block_side
    layout = TokenLayout([(1, 2 * P, P), (1, P + 2, P)], P)
    tokens, mask = random_tokens(layout, 1, 2, 20), random_mask(layout, 1, 2)
    grad_out = random_tokens(layout, 1, 2, 20, seed=1)[0]
    grad_lse = torch.randn(1, 2, layout.tokens, generator=torch.Generator().manual_seed(2))
    ours = gradients(
        kernels.block_sparse_attention_backward, tokens, mask, layout, grad_out, grad_lse,
        kernels.block_sparse_attention,
    )  # fmt: skip
    eager, exact = (
        gradients(
            block_sparse_attention_backward_reference, [x.to(dtype) for x in tokens], mask, layout,
            grad_out.to(dtype), grad_lse.to(dtype), block_sparse_attention_reference,
        )
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_error_bounded(mine, theirs, truth)


def everything(tokens, mask, grad_out):
    """out, lse and the three gradients."""
    attention, backward = kernels.block_sparse_attention, kernels.block_sparse_attention_backward
    return [
        *forward(attention, *tokens, mask, mask.layout),
        *gradients(backward, tokens, mask, mask.layout, grad_out, None, attention),
    ]


@pytest.mark.parametrize("generation", [8, 10], indirect=True)
def test_strides_and_runs_change_no_bit():
    mask, tokens = some_mask(FULL, 2, 2), random_tokens(FULL, 2, 2, 64, dtype=torch.bfloat16)
    grad_out = random_tokens(FULL, 2, 2, 64, seed=1, dtype=torch.bfloat16)[0]
    expected = everything(tokens, mask, grad_out)
    *arguments, gradient = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*tokens, grad_out))
    for again, once in zip(everything(arguments, mask, gradient), expected, strict=True):
        assert torch.equal(again, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_undefined_and_infinite_input_gives_what_the_definition_gives(name, value, dtype):
    tokens = dict(zip("qkv", random_tokens(FULL, 1, 1, 64, dtype=dtype), strict=True))
    tokens[name][0, 0, 3, 5] = value
    dense = torch.ones(1, 1, FULL.blocks, FULL.blocks, dtype=torch.bool)
    dense[0, 0, ::2, 0] = False
    mask = BlockMask.from_dense(dense, FULL)
    ours, lse = forward(kernels.block_sparse_attention, *tokens.values(), mask, FULL)
    (reference, reference_lse), (exact, _) = (
        forward(block_sparse_attention_reference, *(x.to(wide) for x in tokens.values()), mask, FULL)
        for wide in (torch.float32, torch.float64)
    )
    finite = exact.isfinite()
    assert 0 < finite.sum() < finite.numel()
    torch.testing.assert_close(ours[~finite].float(), reference[~finite], equal_nan=True, rtol=0, atol=0)
    assert_error_bounded(ours[finite], reference[finite].to(dtype), exact[finite])
    torch.testing.assert_close(lse, reference_lse, equal_nan=True, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
def test_undefined_and_infinite_input_gives_the_gradients_of_the_definition(name, value):
    tokens = dict(zip("qkv", random_tokens(FULL, 1, 1, 16), strict=True))
    grad_out = random_tokens(FULL, 1, 1, 16, seed=1)[0]
    (tokens | {"grad_out": grad_out})[name][0, 0, 3, 5] = value
    mask = random_mask(FULL, 1, 1)
    ours, expected = (
        gradients(function, tokens.values(), mask, FULL, grad_out, None, block_sparse_attention_reference)
        for function in (kernels.block_sparse_attention_backward, block_sparse_attention_backward_reference)
    )
    assert not all(x.isfinite().all() for x in expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_scores_are_all_minus_infinity_are_undefined(dtype):
    q, k, v = (x.abs() + 1 for x in random_tokens(FULL, 1, 1, 64, dtype=dtype))
    k[:, :, :, 0] = -float("inf")
    mask = random_mask(FULL, 1, 1)
    reads = over_tokens(mask.to_dense(), FULL).any(-1)
    out, lse = forward(kernels.block_sparse_attention, q, k, v, mask, FULL)
    assert torch.equal(lse.isnan(), reads)
    assert torch.equal(out.isnan().all(-1), reads)
    assert (lse[~reads] == -float("inf")).all()


def test_tokens_of_a_tile_may_stand_further_apart_than_32_bits_count():
    layout = TokenLayout((1, 8, 16))
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), layout)
    tokens = random_tokens(layout, 1, 1, 16, dtype=torch.bfloat16)
    grad_out = random_tokens(layout, 1, 1, 16, seed=1, dtype=torch.bfloat16)[0]
    *apart, apart_grad = far_apart([*tokens, grad_out])
    expected = everything(tokens, mask, grad_out)
    for again, once in zip(everything(apart, mask, apart_grad), expected, strict=True):
        assert torch.equal(again, once)


def test_no_batch_no_heads_and_one_token():
    layout = TokenLayout((1, 1, 1))
    one = torch.ones(1, 1, 1, 64)
    mask = BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), layout)
    assert torch.equal(forward(kernels.block_sparse_attention, one, one, one, mask, layout)[0], one)
    assert forward(kernels.block_sparse_attention, one[:0], one[:0], one[:0], mask, layout)[0].shape == (0, 1, 1, 64)
