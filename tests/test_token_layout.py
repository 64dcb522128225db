"""TokenLayout: every token in exactly one block, blocks in the order of the report's Figure 15."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from k5kernels import TokenLayout

GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
LAYOUTS = st.builds(TokenLayout, st.lists(GRIDS, min_size=1, max_size=3), st.integers(1, 9))


def row_major_coordinates(layout: TokenLayout) -> torch.Tensor:
    """(clip, t, y, x) of each token, in tokens, in row-major order."""
    clips = [
        torch.cartesian_prod(torch.tensor([number]), *(torch.arange(side) for side in grid)).view(-1, 4)
        for number, grid in enumerate(layout.clips)
    ]
    return torch.cat(clips)


@given(LAYOUTS)
def test_fractal_order_is_a_permutation_and_has_an_inverse(layout):
    order = layout.permutation()
    assert torch.equal(order.sort().values, torch.arange(layout.tokens))
    assert torch.equal(order[layout.inverse_permutation()], torch.arange(layout.tokens))


@given(LAYOUTS)
def test_a_block_holds_neighbouring_tokens_of_one_frame_and_nothing_else(layout):
    starts = layout.block_starts()
    assert starts[0] == 0
    assert starts[-1] == layout.tokens
    assert starts.diff().min() >= 1
    assert starts.diff().max() == layout.max_block_tokens <= layout.block_side**2
    block_of_position = torch.arange(layout.blocks).repeat_interleave(starts.diff())
    tokens = row_major_coordinates(layout)[layout.permutation()]
    tokens[:, 2:] //= layout.block_side
    assert torch.equal(layout.block_coordinates()[block_of_position], tokens)


@given(LAYOUTS)
def test_blocks_stand_by_clip_then_time_then_row_then_column(layout):
    coordinates = [tuple(row) for row in layout.block_coordinates().tolist()]
    assert coordinates == sorted(set(coordinates))
    clips = torch.tensor([clip for clip, *_ in coordinates])
    starts = layout.clip_block_starts()
    assert torch.equal(starts.diff(), clips.bincount(minlength=len(layout.clips)))
    assert tuple(starts.tolist()) == layout.clip_blocks
    assert starts.diff().max() == layout.max_clip_blocks
    assert torch.equal(layout.block_starts()[starts], torch.tensor(layout.clip_tokens))


def test_a_16_by_16_frame_is_cut_as_in_figure_15():
    order = TokenLayout((1, 16, 16)).permutation()
    assert order[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17]
    assert order[64:66].tolist() == [8, 9]
    assert order[128:130].tolist() == [128, 129]


def test_a_side_that_is_no_multiple_of_the_block_side_gives_smaller_blocks_and_no_padding():
    layout = TokenLayout((2, 9, 10))
    assert layout.block_starts().diff().tolist() == [64, 16, 8, 2] * 2
    assert layout.tokens == 180
    assert not layout.full_blocks
    assert TokenLayout((2, 8, 16)).full_blocks


def test_sizes_of_the_released_models():
    assert (TokenLayout((61, 32, 48)).tokens, TokenLayout((61, 32, 48)).blocks) == (93_696, 1_464)
    assert (TokenLayout((61, 48, 80)).tokens, TokenLayout((61, 48, 80)).blocks) == (234_240, 3_660)


def test_clips_may_be_lists_or_one_grid_and_equal_layouts_share_their_tensors():
    one, same = TokenLayout((2, 5, 7)), TokenLayout([[2, 5, 7]])
    assert one == same
    assert hash(one) == hash(same)
    assert one.clips == ((2, 5, 7),)
    assert one.permutation("cpu") is same.permutation(torch.device("cpu"))
    assert one != TokenLayout((2, 5, 7), block_side=4)


def test_tensors_first_asked_for_in_inference_or_fake_mode_serve_training_afterwards():
    layout = TokenLayout((1, 3, 31))
    with FakeTensorMode():
        layout.block_starts()
    with torch.inference_mode():
        starts = layout.block_starts()
    assert type(starts) is torch.Tensor
    assert not starts.is_inference()


def test_tensors_stand_on_the_device_asked_for(device):
    layout = TokenLayout([(1, 9, 9), (2, 3, 3)])
    methods = ("block_starts", "clip_block_starts", "block_coordinates", "permutation", "inverse_permutation")
    for method in methods:
        tensor = getattr(layout, method)(device)
        assert tensor.device.type == device
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("clips", [(), (0, 8, 8), (1, 8), (1, 8, 8.0), [(1, 8, 8), (1, 8)], 8, (True, 8, 8)])
def test_what_is_no_grid_is_refused(clips):
    with pytest.raises(ValueError, match="clips: expected"):
        TokenLayout(clips)


@pytest.mark.parametrize("side", [0, -8, 8.0])
def test_a_block_side_that_is_no_positive_integer_is_refused(side):
    with pytest.raises(ValueError, match="block_side: expected"):
        TokenLayout((1, 8, 8), side)
