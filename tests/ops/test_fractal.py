"""Fractal order: the tokens of a block become contiguous, and nothing else changes."""

import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import assert_compiled_equals_eager

from k5kernels import TokenLayout, fractal_flatten, fractal_unflatten
from k5kernels.ops.fractal import COPIED_DTYPES, fractal_flatten_reference, fractal_unflatten_reference

GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))


def numbered(batch: int, grid: tuple[int, ...], *rest: int) -> torch.Tensor:
    shape = (batch, *grid, *rest)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@given(GRIDS, st.integers(1, 9), st.sampled_from([(), (3,), (2, 3)]))
def test_unflatten_undoes_flatten(grid, block_side, rest):
    layout = TokenLayout(grid, block_side)
    x = numbered(2, grid, *rest)
    flat = fractal_flatten(x, layout)
    assert flat.shape == (2, layout.tokens, *rest)
    assert torch.equal(fractal_unflatten(flat, layout), x)


@given(st.lists(GRIDS, min_size=2, max_size=3))
def test_several_clips_stand_one_after_another_each_in_its_own_order(grids):
    layout = TokenLayout(grids)
    clips = [numbered(2, grid, 3) for grid in grids]
    flat = fractal_flatten(clips, layout)
    alone = [fractal_flatten(clip, TokenLayout(grid)) for clip, grid in zip(clips, grids, strict=True)]
    assert torch.equal(flat, torch.cat(alone, dim=1))
    assert torch.equal(flat, torch.cat([clip.flatten(1, 3) for clip in clips], dim=1)[:, layout.permutation()])
    for again, clip in zip(fractal_unflatten(flat, layout), clips, strict=True):
        assert torch.equal(again, clip)


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 16, 24), (2, 24, 8)])
def test_the_order_is_that_of_diffusers_where_blocks_divide_the_frame(grid):
    x = numbered(2, grid, 5)
    theirs, _ = transformer_kandinsky.fractal_flatten(x, x, x.shape[:-1], block_mask=True)
    layout = TokenLayout(grid)
    assert torch.equal(fractal_flatten(x, layout), theirs)
    assert torch.equal(
        fractal_unflatten(theirs, layout),
        transformer_kandinsky.fractal_unflatten(theirs, x.shape[:-1], block_mask=True),
    )


def test_gradients_go_back_to_the_tokens_they_came_from():
    layout = TokenLayout((2, 5, 7), block_side=3)
    x = torch.randn(2, 2, 5, 7, 3, dtype=torch.float64, requires_grad=True)
    flat = torch.randn(2, layout.tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fractal_flatten(x, layout), (x,))
    assert torch.autograd.gradcheck(lambda x: fractal_unflatten(x, layout), (flat,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_any_dtype_and_any_strides_pass_unchanged(dtype, device):
    layout = TokenLayout((2, 5, 9), block_side=4)
    x = torch.randn(3, 9, 5, 2, 2, device=device).to(dtype).transpose(1, 3)
    flat = fractal_flatten(x, layout)
    assert flat.dtype == dtype
    assert torch.equal(fractal_unflatten(flat, layout), x)


@pytest.mark.parametrize("dtype", [*COPIED_DTYPES, torch.complex64])
@pytest.mark.parametrize(("grid", "block_side"), [((2, 5, 9), 4), ((3, 16, 24), 8), ((1, 1, 1), 8), ((2, 45, 80), 8)])
def test_the_kernels_move_tokens_as_the_definition_does(grid, block_side, dtype, isa):
    x = numbered(2, grid, 3).to(dtype)
    flat = fractal_flatten_reference(x, block_side)
    assert torch.equal(torch.ops.k5.fractal_flatten(x, block_side), flat)
    assert torch.equal(torch.ops.k5.fractal_unflatten(flat, *grid, block_side), x)
    assert torch.ops.k5.fractal_flatten(x[:0], block_side).shape == flat[:0].shape


def test_a_clip_cut_from_a_sequence_is_read_where_it_stands():
    sequence = torch.randn(2, 200, 3)
    clip = sequence[:, 20:110]
    assert torch.equal(torch.ops.k5.fractal_unflatten(clip, 2, 5, 9, 4), fractal_unflatten_reference(clip, 2, 5, 9, 4))


def test_the_operators_pass_pytorchs_checks(device):
    x = torch.randn(2, 2, 5, 9, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.k5.fractal_flatten, (x, 4))
    flat = torch.randn(2, 90, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.k5.fractal_unflatten, (flat, 2, 5, 9, 4))


def test_one_compiled_graph_serves_several_grids():
    def there_and_back(x):
        layout = TokenLayout(tuple(x.shape[1:4]))
        return fractal_unflatten(fractal_flatten(x, layout) * 2, layout)

    grids = [(2, 9, 17), (3, 12, 18)]
    assert_compiled_equals_eager(there_and_back, [(torch.randn(4, *grid, 5),) for grid in grids], [0])


def test_what_does_not_fit_the_layout_is_refused():
    layout, two = TokenLayout((2, 5, 7)), TokenLayout([(2, 5, 7), (1, 3, 3)])
    with pytest.raises(ValueError, match="expected 2 tensors"):
        fractal_flatten(torch.zeros(1, 2, 5, 7, 3), two)
    with pytest.raises(ValueError, match=r"expected \[B, 2, 5, 7, ...\] for clip 0, got \[1, 2, 7, 5, 3\]"):
        fractal_flatten(torch.zeros(1, 2, 7, 5, 3), layout)
    with pytest.raises(ValueError, match=r"expected \[B, 70, ...\]"):
        fractal_unflatten(torch.zeros(1, 71, 3), layout)
