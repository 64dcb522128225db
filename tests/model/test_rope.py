"""Rotary tables: angles, order of the axes, scaling."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5RoPE1D, Kandinsky5RoPE3D

from k5kernels import TokenLayout
from model.rope import text_rope, visual_rope

AXES = (8, 12, 12)


def row_major(*clip: int) -> TokenLayout:
    return TokenLayout((clip,), 1)


def test_the_angle_of_a_pair_is_its_position_times_its_frequency():
    cos, sin = text_rope(11, 16)
    assert cos.shape == sin.shape == (11, 8)
    assert cos[7, 3].item() == pytest.approx(math.cos(7 * 10_000 ** (-3 / 8)), abs=1e-6)
    assert sin[10, 5].item() == pytest.approx(math.sin(10 * 10_000 ** (-5 / 8)), abs=1e-6)


def test_each_axis_turns_its_own_channels_in_row_major_order():
    cos, _ = visual_rope(row_major(3, 4, 5), AXES)
    assert cos.shape == (60, 16)
    grid = cos.view(3, 4, 5, 16)
    for axis, (first, end) in enumerate([(0, 4), (4, 10), (10, 16)]):
        line = grid.movedim(axis, 0)[:, 0, 0, first:end]
        torch.testing.assert_close(line, text_rope(grid.shape[axis], AXES[axis])[0])
        assert torch.equal(grid[..., first:end].movedim(axis, 0)[:, 2, 2], line)


def test_tokens_stand_in_the_layouts_order_and_each_clip_begins_at_zero():
    clips = [(2, 9, 17), (1, 8, 20)]
    layout = TokenLayout(clips)
    alone = [torch.cat(tables) for tables in zip(*(visual_rope(row_major(*clip), AXES) for clip in clips), strict=True)]
    for table, expected in zip(visual_rope(layout, AXES), alone, strict=True):
        assert torch.equal(table, expected[layout.permutation()])


def test_a_layouts_tables_are_made_once():
    layout = TokenLayout((2, 3, 4))
    first, again = visual_rope(layout, AXES), visual_rope(TokenLayout((2, 3, 4)), AXES)
    assert first[0] is again[0]
    assert first[0] is not visual_rope(layout, AXES, (1.0, 2.0, 2.0))[0]


def test_scale_divides_positions():
    doubled, plain = visual_rope(row_major(1, 9, 1), AXES, (1.0, 2.0, 1.0)), visual_rope(row_major(1, 5, 1), AXES)
    torch.testing.assert_close((doubled[0][::2], doubled[1][::2]), plain)


def test_tables_equal_those_of_diffusers():
    text = Kandinsky5RoPE1D(32)(torch.arange(20)).squeeze(-4)
    torch.testing.assert_close(torch.stack(text_rope(20, 32)), torch.stack([text[..., 0, 0], text[..., 1, 0]]))
    scale = (1.0, 2.0, 3.16)
    positions = [torch.arange(n) for n in (3, 5, 7)]
    visual = Kandinsky5RoPE3D(AXES)((1, 3, 5, 7), positions, scale).reshape(105, 16, 2, 2)
    expected = torch.stack([visual[..., 0, 0], visual[..., 1, 0]])
    torch.testing.assert_close(torch.stack(visual_rope(row_major(3, 5, 7), AXES, scale)), expected)


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="rope_scale"):
        visual_rope(row_major(1, 2, 2), AXES, (1.0, -1.0, 1.0))
