"""Tiles of a decoded video: whole pictures where there is room, less memory where there is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner import ClipShape
from k5kernels.planner.decoding import (
    CHANNELS,
    FRAMES,
    LIVE_BYTES,
    MOST_VALUES,
    VAE_BYTES,
    tile,
    tile_values,
    working_bytes,
)
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig

GIB = 2**30
KEPT = 12.0

sides = st.integers(8, 130).map(lambda side: 16 * side)
clips = st.builds(lambda h, w, groups: ClipShape(h, w, 1 + 4 * groups), sides, sides, st.integers(1, 60))
memory = st.floats(2, 100).map(lambda gib: gib * GIB)


def test_a_card_with_room_decodes_whole_pictures_and_a_small_one_tiles():
    clip = ClipShape(512, 768, 121)
    assert tile(clip, 79 * GIB) == (512, 768)
    assert tile(clip, 11 * GIB) == (512 // 2 + 16, 768 // 2 + 16)


def test_a_picture_whose_tensor_is_too_long_is_tiled_on_every_card():
    assert tile(ClipShape(768, 1280, 121), 200 * GIB) == (768 // 2 + 16, 448)


def test_an_upright_picture_is_the_lying_one_turned():
    assert tile(ClipShape(1280, 768, 121), 79 * GIB) == tile(ClipShape(768, 1280, 121), 79 * GIB)[::-1]


@given(clips, memory)
def test_tiles_cover_the_picture_fit_in_a_tensor_and_need_no_more_than_planned(clip, free):
    height, width = tile(clip, free)
    assert 0 < height <= clip.height + 16
    assert 0 < width <= clip.width + 16
    assert CHANNELS * FRAMES * height * width < MOST_VALUES * 1.1


@given(clips, memory)
def test_more_free_memory_never_gives_more_tiles(clip, free):
    (height, width), (taller, wider) = tile(clip, free), tile(clip, 2 * free)
    assert height <= taller or width <= wider


@given(clips, memory)
def test_decoding_takes_no_more_than_is_free_unless_its_tensors_do(clip, free):
    taken = working_bytes(clip, free, KEPT)
    assert taken <= max(free, LIVE_BYTES * tile_values(clip, free))
    assert LIVE_BYTES * tile_values(clip, free) <= taken <= KEPT * tile_values(clip, free)


def test_an_image_is_decoded_by_another_vae():
    assert working_bytes(ClipShape(1024, 1024, 1), GIB, KEPT) == 0


def test_the_vaes_weights_are_those_of_the_released_one():
    with torch.device("meta"):
        parts = HunyuanEncoder(VAEConfig()), HunyuanDecoder(VAEConfig())
    weights = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert pytest.approx(2 * weights, rel=2e-3) == VAE_BYTES
