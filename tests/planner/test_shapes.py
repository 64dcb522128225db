"""The planner's table of models and its clip sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner import MODELS, ClipShape, frames_for, model_shape


@pytest.mark.parametrize(
    ("name", "model_dim", "time_dim", "ff_dim", "blocks", "heads"),
    [
        ("image_lite", 2560, 512, 10240, 50, 20),
        ("video_lite", 1792, 512, 7168, 32, 28),
        ("video_pro", 4096, 1024, 16384, 60, 32),
    ],
)
def test_the_released_models_have_the_sizes_of_table_3(name, model_dim, time_dim, ff_dim, blocks, heads):
    shape = MODELS[name]
    assert (shape.model_dim, shape.time_dim, shape.ff_dim, shape.blocks) == (model_dim, time_dim, ff_dim, blocks)
    assert shape.heads == heads


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="preset: expected one of image_lite, video_lite, video_pro, got 'pro'"):
        model_shape("pro")


def test_a_10_s_clip_at_512_by_768_is_93696_tokens():
    clip = ClipShape(height=512, width=768, frames=241)
    assert (clip.latent_frames, clip.pixels, clip.tokens) == (61, 512 * 768 * 61, 93_696)


def test_an_image_is_one_latent_frame():
    assert ClipShape(height=1024, width=1024, frames=1).tokens == 64 * 64


@pytest.mark.parametrize(("seconds", "frames"), [(5, 121), (10, 241), (0.01, 1), (2.05, 49)])
def test_seconds_become_frames_that_the_vae_takes(seconds, frames):
    assert frames_for(seconds) == frames


@given(st.floats(0.001, 1e6))
def test_every_length_gives_a_clip_within_two_frames_of_it(seconds):
    frames = frames_for(seconds)
    assert ClipShape(256, 256, frames).frames == frames
    assert abs(frames - 1 - 24 * seconds) <= 2 + 1e-6


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((500, 768, 121), "height: expected a multiple of 16 pixels, got 500"),
        ((512, 760, 121), "width: expected a multiple of 16 pixels, got 760"),
        ((512, 768, 120), r"frames: expected 1 \+ a multiple of 4, got 120"),
        ((0, 768, 121), "height: expected an integer from 1"),
        ((512, 768, 0), "frames: expected an integer from 1"),
    ],
)
def test_a_clip_that_the_vae_cannot_take_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        ClipShape(*size)


def test_no_length_is_refused():
    with pytest.raises(ValueError, match=r"seconds: expected a number above 0, .* got 0"):
        frames_for(0)
