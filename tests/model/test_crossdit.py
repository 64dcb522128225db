"""CrossDiT against diffusers' independent implementation, and what it promises beyond it."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from diffusers.models.transformers import transformer_kandinsky
from small_crossdit import CONFIG, inputs, random_model, relative_difference
from torch import Tensor

from k5kernels.offload import ActivationOffload
from model import DENSE, AttentionConfig, CrossDiT, TextCondition
from model.crossdit import Float32Linear
from model.latent_tokens import latent_velocity as velocity
from model.weights import config_to_json

ROPE_SCALE = (1.0, 2.0, 3.16)
NABLA = AttentionConfig("nabla", thr=0.5, sta=(3, 1, 1))


def diffusers_model(model: CrossDiT) -> Kandinsky5Transformer3DModel:
    other = Kandinsky5Transformer3DModel(**config_to_json(model.config))
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def run_diffusers(
    model: Kandinsky5Transformer3DModel, x: Tensor, time: Tensor, text: TextCondition, sparse: dict | None = None
) -> Tensor:
    positions = [torch.arange(side) for side in (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)]
    return model(
        x, text.tokens, time, text.pooled, positions, torch.arange(text.tokens.shape[1]), ROPE_SCALE, sparse
    ).sample


@pytest.fixture
def round_q_and_k_like_diffusers(monkeypatch):
    """diffusers rounds q and k to bfloat16 after the rotary embedding, in float32 too."""
    from model import crossdit

    exact = crossdit.qk_norm_rope

    def rounded(*args, **kwargs):
        return tuple(x.bfloat16().to(x.dtype) for x in exact(*args, **kwargs))

    monkeypatch.setattr(crossdit, "qk_norm_rope", rounded)


GRIDS = [(1, 2, 2), (1, 8, 8), (3, 6, 10), (5, 4, 14), (7, 12, 6)]


@pytest.mark.usefixtures("round_q_and_k_like_diffusers")
@pytest.mark.parametrize("visual_cond", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_output_equals_diffusers(grid, batch, visual_cond):
    model = random_model(replace(CONFIG, visual_cond=visual_cond))
    x, time, text = inputs(batch, grid, model.config)
    expected = run_diffusers(diffusers_model(model), x, time, text)
    actual = velocity(model, x, time, text, rope_scale=ROPE_SCALE)
    assert actual.shape == expected.shape == (batch, *grid, 16)
    assert relative_difference(actual, expected) < 1e-4


@torch.no_grad()
def test_without_rounding_q_and_k_the_output_differs_from_diffusers_by_bfloat16_noise():
    """6e-4 relative on this model: diffusers' own distance from a model that keeps q and k in float32."""
    model = random_model()
    x, time, text = inputs(2, (3, 6, 10))
    expected = run_diffusers(diffusers_model(model), x, time, text)
    difference = relative_difference(velocity(model, x, time, text, rope_scale=ROPE_SCALE), expected)
    assert 1e-5 < difference < 2e-3


@pytest.mark.usefixtures("round_q_and_k_like_diffusers")
@pytest.mark.parametrize("thr", [0.3, 0.6, 0.9])
@torch.no_grad()
def test_nabla_equals_diffusers(monkeypatch, thr):
    """diffusers selects the blocks; its call to flex_attention, which on CPU needs compiling, gives way to SDPA."""
    densities = []

    def attend(q, k, v, attn_mask, **_):
        if attn_mask is not None:
            blocks = attn_mask.to_dense().bool()
            densities.append(blocks.float().mean().item())
            attn_mask = blocks.repeat_interleave(64, -2).repeat_interleave(64, -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2)

    monkeypatch.setattr(transformer_kandinsky, "dispatch_attention_fn", attend)
    grid, window = (5, 32, 48), (3, 1, 1)
    model = random_model()
    x, time, text = inputs(1, grid)
    sta = Kandinsky5T2VPipeline.fast_sta_nabla(5, 2, 3, *window, device="cpu")
    expected = run_diffusers(
        diffusers_model(model), x, time, text, {"sta_mask": sta[None, None], "P": thr, "to_fractal": True}
    )
    actual = velocity(model, x, time, text, rope_scale=ROPE_SCALE, attention=AttentionConfig("nabla", thr, window))
    assert all(0.1 < density < 0.95 for density in densities)
    assert relative_difference(actual, expected) < 1e-4


@pytest.mark.parametrize("visual_cond", [False, True])
def test_parameters_are_those_of_diffusers(visual_cond):
    model = random_model(replace(CONFIG, visual_cond=visual_cond))
    other = Kandinsky5Transformer3DModel(**config_to_json(model.config))
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    assert shapes == {name: p.shape for name, p in other.state_dict().items()}
    other.load_state_dict(model.state_dict(), strict=True)
    CrossDiT(model.config).load_state_dict(other.state_dict(), strict=True)


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 22, 38), (2, 18, 14)])
@torch.no_grad()
def test_nabla_that_keeps_everything_equals_dense_on_any_grid(grid):
    model = random_model()
    x, time, text = inputs(2, grid)
    dense = velocity(model, x, time, text, rope_scale=ROPE_SCALE)
    nabla = velocity(model, x, time, text, rope_scale=ROPE_SCALE, attention=AttentionConfig("nabla", 1.0, None))
    torch.testing.assert_close(nabla, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nabla_drops_blocks():
    model = random_model()
    x, time, text = inputs(1, (3, 34, 34))
    dense, nabla = (
        velocity(model, x, time, text),
        velocity(model, x, time, text, attention=AttentionConfig("nabla", 0.2, None)),
    )
    assert relative_difference(nabla, dense) > 1e-3


@torch.no_grad()
def test_rope_scale_divides_positions():
    model = random_model()
    x, time, text = inputs(1, (3, 6, 6))
    base = velocity(model, x, time, text)
    for axis in range(3):
        scale = tuple(2.0 if i == axis else 1.0 for i in range(3))
        assert relative_difference(velocity(model, x, time, text, rope_scale=scale), base) > 1e-4


@pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])
@pytest.mark.parametrize("padding", [1.0, 1e4, math.nan])
@torch.no_grad()
def test_masked_text_does_not_change_the_output(attention, padding):
    model = random_model()
    x, time, text = inputs(2, (2, 18, 6), length=6)
    tokens = torch.cat([text.tokens, torch.full((2, 3, CONFIG.in_text_dim), padding)], dim=1)
    mask = torch.arange(9).expand(2, -1) < 6
    expected = velocity(model, x, time, text, attention=attention)
    actual = velocity(model, x, time, TextCondition(tokens, mask, text.pooled), attention=attention)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_sample_has_its_own_text_length():
    model = random_model()
    x, time, text = inputs(2, (1, 4, 4), length=5)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    together = velocity(model, x, time, replace(text, mask=mask))
    alone = velocity(model, x[1:], time[1:], TextCondition(text.tokens[1:, :2], None, text.pooled[1:]))
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_mask_means_every_token_is_valid():
    model = random_model()
    x, time, text = inputs(2, (1, 4, 4))
    valid = torch.ones(text.tokens.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(velocity(model, x, time, replace(text, mask=valid)), velocity(model, x, time, text))


@torch.no_grad()
def test_a_text_with_no_valid_token_gives_a_finite_output():
    model = random_model()
    x, time, text = inputs(1, (1, 4, 4))
    nothing = torch.zeros(text.tokens.shape[:2], dtype=torch.bool)
    assert velocity(model, x, time, replace(text, mask=nothing)).isfinite().all()


@torch.no_grad()
def test_the_blocks_of_a_fresh_model_are_the_identity():
    model = CrossDiT(CONFIG)
    x, time, text = inputs(1, (2, 4, 4))
    torch.testing.assert_close(
        velocity(model, x, time, text),
        velocity(model, x, time, text, cache=lambda blocks, tokens: tokens),
    )


@pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])
@torch.no_grad()
def test_cache_stands_around_the_visual_blocks(attention):
    model = random_model()
    x, time, text = inputs(1, (2, 18, 6))
    residuals = []

    def compute(blocks, tokens):
        residuals.append(blocks(tokens) - tokens)
        return tokens + residuals[-1]

    def reuse(blocks, tokens):
        return tokens + residuals[-1]

    expected = velocity(model, x, time, text, attention=attention)
    torch.testing.assert_close(velocity(model, x, time, text, attention=attention, cache=compute), expected)
    torch.testing.assert_close(velocity(model, x, time, text, attention=attention, cache=reuse), expected)
    assert residuals[0].shape == (1, 2 * 9 * 3, CONFIG.model_dim)


def gradients(model: CrossDiT, attention: AttentionConfig) -> dict[str, Tensor]:
    model.zero_grad()
    x, time, text = inputs(2, (2, 18, 6))
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[7], [4]])
    velocity(model, x, time, replace(text, mask=mask), attention=attention).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", [DENSE, NABLA], ids=["dense", "nabla"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_and_offload_do_not_change_a_bit_of_the_gradients(attention, checkpointed, offload, tmp_path):
    model = random_model().train()
    expected = gradients(model, attention)
    model.gradient_checkpointing = checkpointed
    model.offload = ActivationOffload(tmp_path, min_bytes=1) if offload else None
    actual = gradients(model, attention)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    assert all(gradient is not None and gradient.norm() > 0 for gradient in expected.values())


def saved_bytes(model: CrossDiT) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    x, time, text = inputs(1, (2, 12, 12))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity(model, x, time, text)
    return total


def test_checkpointing_keeps_only_the_input_of_each_visual_block():
    model = random_model(replace(CONFIG, visual_blocks=4)).train()
    plain = saved_bytes(model)
    model.gradient_checkpointing = True
    four = saved_bytes(model)
    del model.visual_transformer_blocks[3]
    assert four - saved_bytes(model) == 2 * 6 * 6 * CONFIG.model_dim * 4
    assert four < plain / 4


def test_offload_moves_exactly_the_inputs_of_the_visual_blocks():
    moved = []
    model = random_model().train()
    model.gradient_checkpointing = True
    model.offload = torch.autograd.graph.saved_tensors_hooks(lambda x: (moved.append(x.shape), x)[1], lambda x: x)
    x, time, text = inputs(1, (2, 12, 12))
    velocity(model, x, time, text)
    assert moved == [(1, 72, CONFIG.model_dim)] * CONFIG.visual_blocks


@torch.no_grad()
def test_the_modulation_path_stays_float32_in_a_bfloat16_model():
    model, reference = random_model().to(torch.bfloat16), random_model()
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if "modulation" in name or "time_embed" in name}
    for name in kept:
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name))
    x, time, text = inputs(1, (2, 6, 6))
    out = velocity(model, x, time, text)
    assert out.dtype == torch.bfloat16
    assert relative_difference(out, velocity(reference, x, time, text)) < 0.05


def test_autocast_trains_with_modulation_in_float32():
    model = random_model().train()
    x, time, text = inputs(1, (2, 6, 6))
    dtypes = []
    for module in model.modules():
        if isinstance(module, Float32Linear):
            module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = velocity(model, x, time, text)
    out.float().square().mean().backward()
    assert set(dtypes) == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert relative_difference(out, velocity(model, x, time, text)) < 0.05


def test_wrong_input_is_refused_with_what_was_expected():
    model = random_model()
    x, time, text = inputs(2, (1, 4, 4))
    narrow = TextCondition(text.tokens[..., :5], None, text.pooled)
    short = TextCondition(text.tokens, None, text.pooled[..., :5])
    for wrong, words in [
        ((x[..., :16], time, text), r"\[B, T, H, W, 33\]"),
        ((x[:, :, :3], time, text), "multiples of the patch"),
        ((x, time[:1], text), r"time: expected one value for each clip of each sample, \[2\]"),
        ((x[:1], time[:1], text), "text tokens: expected"),
        ((x, time, narrow), "text tokens: expected"),
        ((x, time, short), "pooled text: expected"),
    ]:
        with pytest.raises(ValueError, match=words):
            velocity(model, *wrong)
    with pytest.raises(ValueError, match="text mask: expected bool"):
        replace(text, mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="rope_scale"):
        velocity(model, x, time, text, rope_scale=(1.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"axes_dims": (8, 12, 11)}, "axes_dims"),
        ({"model_dim": 65}, "multiple of the head dim"),
        ({"patch_size": (1, 0, 2)}, "patch_size"),
    ],
)
def test_an_impossible_config_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)
