"""Compiled with dynamic sizes, a model or a block is one graph for clips of every length and size."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from small_crossdit import CONFIG, inputs, random_model
from torch import Tensor
from torch.fx.experimental import _config as symbolic_sizes

from k5kernels import TokenLayout
from k5kernels.attention import DENSE, AttentionConfig
from model.crossdit import VisualContext
from model.latent_tokens import ROW_MAJOR, latent_velocity, layout_for, to_tokens
from model.rope import visual_rope

ROPE_SCALE = (1.0, 2.0, 3.16)
NABLA = AttentionConfig("nabla", thr=0.5, sta=(3, 1, 1))

# Samples, a grid of tokens and text tokens. Some are equal by chance: at first samples, frames and text tokens, rows
# and columns; then text tokens and channels; then text tokens and visual tokens. The last is lower than a block.
Clip = tuple[int, tuple[int, int, int], int]
CLIPS: list[Clip] = [
    (2, (2, 16, 16), 2),
    (3, (4, 20, 14), CONFIG.model_dim),
    (2, (3, 12, 22), 3 * 12 * 22),
    (4, (6, 5, 9), 11),
]
IMAGES: list[Clip] = [(2, (1, 18, 10), 7), (3, (1, 9, 21), 8)]

each_attention = pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])


@pytest.fixture(autouse=True)
def sizes_that_are_equal_stay_apart() -> Iterator[None]:
    with symbolic_sizes.patch(use_duck_shape=False):
        yield


class Graphs:
    """A backend of torch.compile that counts what it compiles, from an empty cache on."""

    def __init__(self, backend: str) -> None:
        torch._dynamo.reset()
        self.backend, self.compiled = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        compiled = self.backend(graph, examples)  # raises where the graph is to be traced again, with fewer symbols
        self.compiled += 1
        return compiled


def graphs_of(function: Callable[..., Any], calls: list[tuple[Any, ...]], backend: str) -> int:
    """How many graphs the compiled function has after these calls, each of which gives what eager gives."""
    graphs = Graphs(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-4, atol=1e-5)
    return graphs.compiled


def block_call(clip: Clip, attention: AttentionConfig) -> tuple[Tensor, VisualContext]:
    """The arguments of a block."""
    samples, grid, length = clip
    layout = TokenLayout(grid) if attention.sparse else TokenLayout(grid, ROW_MAJOR)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(samples, layout.tokens, CONFIG.model_dim, generator=random)
    text = torch.randn(samples, length, CONFIG.model_dim, generator=random)
    modulation = torch.randn(samples, CONFIG.time_dim, generator=random)
    rope = visual_rope(layout, CONFIG.axes_dims, ROPE_SCALE, x.device)
    return x, VisualContext(layout, attention, rope, text, None, modulation)


@each_attention
@torch.no_grad()
def test_a_block_is_one_graph_for_clips_of_every_length_and_size(attention):
    block = random_model().visual_transformer_blocks[0]
    assert graphs_of(block, [block_call(clip, attention) for clip in CLIPS], "eager") == 1


def model_call(clip: Clip, attention: AttentionConfig) -> tuple[Any, ...]:
    """The arguments of a model that is given latents."""
    samples, (T, H, W), length = clip
    return inputs(samples, (T, 2 * H, 2 * W), length=length)


def model_call_of_tokens(clip: Clip, attention: AttentionConfig) -> tuple[Any, ...]:
    """The arguments of a model that is given tokens, whose layout is one of them."""
    x, time, text = model_call(clip, attention)
    layout = layout_for([x], CONFIG.patch_size, attention)
    return to_tokens([x], layout, CONFIG.patch_size), time, text, layout


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize(("attention", "of_latents"), [(DENSE, False), (NABLA, True)], ids=["dense", "nabla"])
@torch.no_grad()
def test_a_model_is_one_graph_for_videos_and_another_for_images(attention, of_latents):
    model = random_model(replace(CONFIG, visual_blocks=1))
    function, call = (partial(latent_velocity, model), model_call) if of_latents else (model, model_call_of_tokens)
    function = partial(function, rope_scale=ROPE_SCALE, attention=attention)
    videos, images = ([call(clip, attention) for clip in clips] for clips in (CLIPS, IMAGES))
    assert graphs_of(function, videos + images, "eager") == 2
