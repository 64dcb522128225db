"""Several clips of different sizes in one sequence: each is computed as if it were alone (§6.1.2)."""

from dataclasses import replace

import pytest
import torch
from small_crossdit import CONFIG, inputs, random_model
from torch import Tensor
from torch.nn.functional import pad

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.offload import ActivationOffload
from model import CrossDiT, TextCondition
from model.latent_tokens import from_tokens, latent_velocity, layout_for, to_tokens

ROPE_SCALE = (1.0, 2.0, 3.16)
NABLA = AttentionConfig("nabla", thr=0.5, sta=(3, 1, 1))
GRIDS = [(3, 36, 44), (1, 34, 6), (2, 4, 4)]
TEXT_LENGTHS = [7, 3, 5]

each_attention = pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])


Clip = tuple[Tensor, Tensor, TextCondition]


def clips_of(batch: int) -> list[Clip]:
    """A latent, times and text for each grid, all different."""
    clips = []
    for seed, (grid, length) in enumerate(zip(GRIDS, TEXT_LENGTHS, strict=True)):
        x, time, text = inputs(batch, grid, length=length, seed=seed)
        clips.append((x, time / (seed + 1), text))
    return clips


def in_rows(clips: list[Tensor]) -> Tensor:
    """[B, ...] of each clip to [B · clips, ...], the clips of the first sample first."""
    return torch.stack(clips, dim=1).flatten(0, 1)


def packed(model: CrossDiT, clips: list[Clip], attention: AttentionConfig) -> list[Tensor]:
    """The velocities of all clips by one pass over one sequence; the texts are padded to one length."""
    latents, times, texts = ([clip[part] for clip in clips] for part in range(3))
    longest = max(text.tokens.shape[1] for text in texts)
    padded = [pad(text.tokens, (0, 0, 0, longest - text.tokens.shape[1]), value=9.0) for text in texts]
    masks = [torch.arange(longest).expand(len(text.tokens), -1) < text.tokens.shape[1] for text in texts]
    text = TextCondition(in_rows(padded), in_rows(masks), in_rows([text.pooled for text in texts]))
    layout = layout_for(latents, CONFIG.patch_size, attention)
    x = to_tokens(latents, layout, CONFIG.patch_size)
    out = model(x, in_rows(times), text, layout, rope_scale=ROPE_SCALE, attention=attention)
    return from_tokens(out, layout, CONFIG.patch_size)


@each_attention
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_each_clip_of_a_packed_sequence_is_as_it_is_alone(attention, batch):
    model, clips = random_model(), clips_of(batch)
    together = packed(model, clips, attention)
    for velocity, clip in zip(together, clips, strict=True):
        expected = latent_velocity(model, *clip, rope_scale=ROPE_SCALE, attention=attention)
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


@each_attention
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("offload", [False, True])
def test_the_gradients_of_a_packed_sequence_are_the_sum_of_those_of_its_clips(attention, batch, offload, tmp_path):
    model, clips = random_model().train(), clips_of(batch)
    model.gradient_checkpointing = offload
    model.offload = ActivationOffload(tmp_path, min_bytes=1) if offload else None

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    together = gradients(sum(velocity.square().sum() for velocity in packed(model, clips, attention)))
    alone = [latent_velocity(model, *clip, rope_scale=ROPE_SCALE, attention=attention) for clip in clips]
    expected = gradients(sum(velocity.square().sum() for velocity in alone))
    for name, gradient in together.items():
        assert gradient.norm() > 0, name
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@each_attention
@pytest.mark.parametrize("what", ["latent", "text", "time"])
@torch.no_grad()
def test_nothing_of_another_clip_reaches_a_clip(attention, what):
    model, clips = random_model(), clips_of(1)
    before = packed(model, clips, attention)
    x, time, text = clips[1]
    clips[1] = {
        "latent": (torch.full_like(x, torch.nan), time, text),
        "text": (x, time, replace(text, tokens=torch.full_like(text.tokens, torch.nan))),
        "time": (x, torch.full_like(time, torch.nan), text),
    }[what]
    after = packed(model, clips, attention)
    assert torch.equal(after[0], before[0])
    assert after[1].isnan().all()
    assert torch.equal(after[2], before[2])


@each_attention
@torch.no_grad()
def test_a_compiled_model_takes_packed_sequences(attention):
    torch._dynamo.reset()
    model, clips = random_model(replace(CONFIG, visual_blocks=1)), clips_of(1)[1:]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(packed(compiled, clips, attention), packed(model, clips, attention), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_the_layout_is_refused():
    model, (first, second, _) = random_model(), clips_of(1)
    latents = [first[0], second[0]]
    layout = layout_for(latents, CONFIG.patch_size, DENSE)
    x = to_tokens(latents, layout, CONFIG.patch_size)
    text = TextCondition(torch.zeros(2, 3, CONFIG.in_text_dim), None, torch.zeros(2, CONFIG.in_text_dim2))
    one = TextCondition(text.tokens[:1], None, text.pooled[:1])
    for wrong, words in [
        ((x[:, 1:], torch.zeros(2), text), r"x: expected \[B, 1239, 132\] for this layout, got \[1, 1238, 132\]"),
        ((x, torch.zeros(1), text), r"time: expected one value for each clip of each sample, \[2\], got \[1\]"),
        ((x, torch.zeros(2), one), r"text tokens: expected \[2, L, 20\], got \[1, 3, 20\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(*wrong, layout)
