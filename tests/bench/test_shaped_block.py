"""The block that benchmarks run: attention has a shape, as in a trained model, and every part moves the output."""

from dataclasses import replace

import pytest
import torch

from bench.shaped_block import block_inputs, density, shaped_block
from k5kernels import TokenLayout
from k5kernels.attention import AttentionConfig
from k5kernels.presets import MODEL_SIZES

CONFIG = replace(MODEL_SIZES["video_lite"], model_dim=256, ff_dim=512, time_dim=64)
LAYOUT = TokenLayout(((9, 32, 32),))


def test_a_tenth_of_the_blocks_holds_a_good_part_of_attention():
    block, inputs = shaped_block(CONFIG), block_inputs(CONFIG, LAYOUT)
    kept = [density(block, inputs, AttentionConfig("nabla", thr=thr)) for thr in (0.3, 0.6, 0.9, 1.0)]
    assert kept == sorted(kept)
    assert kept[0] < 0.12
    assert 0.3 < kept[2] < 0.8
    assert kept[3] == 1


@pytest.mark.parametrize("part", ["self_attention.out_layer", "cross_attention.out_layer", "feed_forward.out_layer"])
@torch.no_grad()
def test_every_part_moves_the_output(part: str):
    block, inputs = shaped_block(CONFIG), block_inputs(CONFIG, TokenLayout(((2, 8, 8),)))
    whole = block(inputs.x, inputs.context())
    block.get_submodule(part).weight.zero_()
    assert (block(inputs.x, inputs.context()) - whole).norm() > 0.1 * whole.norm()
