"""A visual block and the nano model, as they run, against the same in float64."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5TransformerDecoderBlock
from tolerances import assert_error_bounded, assert_matches
from torch import Tensor

from bench.bench_block import run_diffusers
from bench.shaped_block import BlockInputs, block_inputs, shaped_block
from k5kernels import TokenLayout
from k5kernels.presets import MODEL_SIZES
from k5kernels.text_condition import TextCondition
from model import DENSE, AttentionConfig
from model.crossdit import VisualBlock
from model.latent_tokens import latent_velocity
from model.nano import CROSSDIT_WEIGHTS, load_settings
from model.sampler import sample
from model.weights import load_crossdit

CONFIG = replace(MODEL_SIZES["video_lite"], model_dim=192, ff_dim=320, time_dim=48)
LAYOUT = TokenLayout(((2, 18, 13),))
NABLA = AttentionConfig("nabla", thr=0.6)
each_attention = pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])


def in_dtype(inputs: BlockInputs, dtype: torch.dtype) -> BlockInputs:
    return replace(inputs, x=inputs.x.to(dtype), text=inputs.text.to(dtype))


def run(block: VisualBlock, inputs: BlockInputs, attention: AttentionConfig, dtype: torch.dtype) -> Tensor:
    return deepcopy(block).to(dtype)(in_dtype(inputs, dtype).x, in_dtype(inputs, dtype).context(attention))


def block_and_inputs() -> tuple[VisualBlock, BlockInputs]:
    return shaped_block(CONFIG), block_inputs(CONFIG, LAYOUT)


@each_attention
@torch.no_grad()
def test_a_block_in_float32_is_that_in_float64(attention):
    block, inputs = block_and_inputs()
    exact = run(block, inputs, attention, torch.float64)
    assert_matches(run(block, inputs, attention, torch.float32), exact.float())


@torch.no_grad()
def test_a_block_in_bfloat16_errs_no_more_than_diffusers_block():
    block, inputs = block_and_inputs()
    theirs = Kandinsky5TransformerDecoderBlock(CONFIG.model_dim, CONFIG.time_dim, CONFIG.ff_dim, CONFIG.head_dim)
    theirs.load_state_dict(block.state_dict())
    narrow = replace(in_dtype(inputs, torch.bfloat16), time=inputs.time.bfloat16())
    eager = run_diffusers(theirs.bfloat16(), narrow)
    exact = run(block, inputs, DENSE, torch.float64)
    assert_error_bounded(run(block, inputs, DENSE, torch.bfloat16), eager, exact, factor=1.0)


def nano_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, TextCondition]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    return normal(1, 2, 24, 36, 33), torch.tensor([600.0]), TextCondition(normal(1, 9, 384), None, normal(1, 384))


@each_attention
@torch.no_grad()
def test_the_nano_model_in_float32_is_that_in_float64(attention):
    def velocity(dtype: torch.dtype) -> Tensor:
        x, time, text = nano_inputs(dtype)
        return latent_velocity(load_crossdit(CROSSDIT_WEIGHTS, dtype), x, time, text, attention=attention)

    assert_matches(velocity(torch.float32), velocity(torch.float64).float())


@torch.no_grad()
def test_a_nano_sample_is_the_same_with_this_librarys_attention_and_with_pytorchs():
    """90 dB and more of the latent's own range."""
    model, nano = load_crossdit(CROSSDIT_WEIGHTS), load_settings()
    _, _, text = nano_inputs(torch.float32)

    def of(engine: str) -> Tensor:
        return sample(
            model, text, None, (1, 2, 24, 36, 16), steps=6, guidance=1.0, attention=AttentionConfig(engine, nano.thr)
        )

    ours, pytorchs = of("native"), of("sdpa")
    error = (ours - pytorchs).square().mean().sqrt() / (pytorchs.max() - pytorchs.min())
    assert 0 < error < 10 ** (-90 / 20)
