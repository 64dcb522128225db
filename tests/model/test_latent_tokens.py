"""Latents to tokens and back: patches, order, and what is refused."""

import pytest
import torch
from small_crossdit import CONFIG, inputs, random_model

from k5kernels import TokenLayout
from k5kernels.attention import DENSE, AttentionConfig
from model.latent_tokens import from_tokens, latent_velocity, layout_for, patchify, to_tokens, unpatchify

NABLA = AttentionConfig("nabla")
PATCH = (1, 2, 2)


def test_a_patch_holds_its_cells_channels_innermost_going_in_and_outermost_coming_out():
    x = torch.arange(2 * 4 * 6 * 3).view(1, 2, 4, 6, 3)
    patches = patchify(x, PATCH)
    assert patches.shape == (1, 2, 2, 3, 12)
    assert torch.equal(patches[0, 1, 0, 2], x[0, 1, :2, 4:6].flatten())
    back = unpatchify(patches.unflatten(-1, (4, 3)).transpose(-1, -2).flatten(-2), PATCH)
    assert torch.equal(back, x)


def test_tokens_are_row_major_for_a_dense_engine_and_in_fractal_order_for_a_sparse_one():
    x = torch.randn(2, 3, 20, 36, 5)
    patches = patchify(x, PATCH)
    dense, sparse = (layout_for([x], PATCH, attention) for attention in (DENSE, NABLA))
    assert dense.clips == sparse.clips == ((3, 10, 18),)
    assert torch.equal(to_tokens([x], dense, PATCH), patches.flatten(1, 3))
    assert sparse == TokenLayout((3, 10, 18))
    assert torch.equal(to_tokens([x], sparse, PATCH), patches.flatten(1, 3)[:, sparse.permutation()])


@pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])
def test_several_latents_make_one_sequence_and_come_back(attention):
    latents = [torch.randn(2, *grid, 5) for grid in [(3, 20, 36), (1, 2, 2), (2, 18, 6)]]
    layout = layout_for(latents, PATCH, attention)
    tokens = to_tokens(latents, layout, PATCH)
    assert tokens.shape == (2, 3 * 10 * 18 + 1 + 2 * 9 * 3, 4 * 5)
    outward = tokens.unflatten(-1, (4, 5)).transpose(-1, -2).flatten(-2)  # channels outermost, as the model's output
    for back, latent in zip(from_tokens(outward, layout, PATCH), latents, strict=True):
        assert torch.equal(back, latent)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda x: x[..., :16], rf"x: expected \[B, T, H, W, {CONFIG.input_channels}\], got \[1, 2, 4, 6, 16\]"),
        (lambda x: x[0], r"x: expected \[B, T, H, W, "),
        (lambda x: x[:, :, :3], r"multiples of the patch \(1, 2, 2\), got \[2, 3, 6\]"),
    ],
)
def test_a_latent_that_does_not_fit_is_refused_with_what_was_expected(cut, words):
    x, time, text = inputs(1, (2, 4, 6))
    with pytest.raises(ValueError, match=words):
        latent_velocity(random_model(), cut(x), time, text)
