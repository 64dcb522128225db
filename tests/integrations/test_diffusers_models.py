"""Other models of diffusers: stock results where everything is kept, and exactly as before afterwards."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from small_crossdit import relative_difference
from small_kandinsky import leaves_no_trace_of
from torch import Tensor

from k5kernels.cache import MagCache
from k5kernels.integrations.diffusers import UnsupportedModelError, accelerate


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2,
    )  # fmt: skip


def kandinsky6() -> Any:
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=12, time_dim=24, model_dim=64, ff_dim=96,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), visual_cond=False,
    )  # fmt: skip


def super_resolution() -> Any:
    return diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=4, time_dim=24, model_dim=64, ff_dim=96, num_visual_blocks=2,
        axes_dims=(8, 12, 12), nabla_threshold=1.0, nabla_window=(3, 3, 3),
    )  # fmt: skip


def hunyuan(**settings: Any) -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6), **settings,
    )  # fmt: skip


MODELS = {
    "HunyuanVideoTransformer3DModel": hunyuan,
    "WanTransformer3DModel": wan,
    "Kandinsky6Transformer3DModel": kandinsky6,
    "Kandinsky6SRTransformer3DModel": super_resolution,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    if not hasattr(diffusers, request.param):
        pytest.skip(f"this diffusers has no {request.param}")
    return random(MODELS[request.param])


def random(make: Callable[[], Any]) -> Any:
    """The model with random weights: as they are made, gates let nothing through."""
    torch.manual_seed(0)
    made = make().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return made


@torch.no_grad()
def run(model: Any, time: float = 500.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.tensor([time])
    if type(model).__name__ == "Kandinsky6SRTransformer3DModel":
        return model(torch.randn(1, 2, 8, 16, 9, generator=generator), timestep).sample
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    if type(model).__name__ == "WanTransformer3DModel":
        return model(torch.randn(1, 4, 3, 12, 20, generator=generator), timestep, text).sample
    if type(model).__name__ == "HunyuanVideoTransformer3DModel":
        x = torch.randn(1, 4, 3, 18, 22, generator=generator)
        return model(x, timestep, text, torch.ones(1, 5), text[:, 0, :12], guidance=torch.tensor([6e3])).sample
    return model(
        torch.randn(1, 3, 12, 20, 4, generator=generator), text, text[:, 0, :12], timestep,
        audio_hidden_states=torch.randn(1, 6, 20, generator=generator),
    ).sample  # fmt: skip


@pytest.mark.parametrize("engine", ["nabla", "sdpa"])
def test_attention_that_keeps_everything_gives_the_stock_result(model, engine):
    expected = run(model)
    with accelerate(model, attention=engine, thr=1.0) as report:
        assert relative_difference(run(model), expected) < 1e-4
    assert report.engines == {engine: 2}
    assert report.unchanged == {}


def test_sparse_attention_is_told_and_nothing_of_it_is_left(model):
    with leaves_no_trace_of(model, run):
        expected = run(model)
        with accelerate(model, thr=0.3, densities=True) as report:
            assert 1e-4 < relative_difference(run(model), expected) < 1
        assert 0.1 < report.density < 0.95
    trained_with_it = "SR" in type(model).__name__
    assert ("trained with dense attention" in str(report)) != trained_with_it


def test_the_settings_a_model_was_trained_with_are_its_defaults():
    if not hasattr(diffusers, "Kandinsky6SRTransformer3DModel"):
        pytest.skip("this diffusers has no Kandinsky 6")
    model = super_resolution().eval()
    expected = run(model)
    with accelerate(model, densities=True) as report:
        assert relative_difference(run(model), expected) < 1e-4
    assert report.density == 1


def test_a_cached_pass_adds_the_residual_of_every_stream(model):
    policy = MagCache({"cond": [1.0] * 9}, retention=0.0)
    with leaves_no_trace_of(model, run), accelerate(model, attention=None, cache=policy) as report:
        computed = run(model, 900.0)
        cached = run(model, 900.0 - 1e-3)
    assert [one.computed for one in report.caches[0].passes] == [True, False]
    # At nearly the same time with the same input the blocks would have added nearly the same.
    assert relative_difference(cached, computed) < 1e-3


@torch.no_grad()
def speak(model: Any, words: tuple[int, ...]) -> Tensor:
    """HunyuanVideo's pass of prompts of so many words, at most 7."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(words), model.config.in_channels, 3, 18, 22, generator=generator)
    said = (torch.arange(7) < torch.tensor(words)[:, None]).long()
    text = torch.randn(len(words), 7, 16, generator=generator)
    pooled = torch.randn(len(words), 12, generator=generator)
    return model(
        x, torch.full((len(words),), 500.0), text, said, pooled, guidance=torch.full((len(words),), 6e3)
    ).sample


@pytest.mark.parametrize("engine", ["nabla", "sdpa"])
@pytest.mark.parametrize("words", [(7, 7), (5, 5), (3, 6), (1,)])
def test_prompts_of_any_length_are_read_as_the_stock_model_reads_them(engine, words):
    model = random(hunyuan)
    expected = speak(model, words)
    with accelerate(model, attention=engine, thr=1.0) as report:
        assert relative_difference(speak(model, words), expected) < 1e-4
    assert report.engines == {engine: 2}
    assert report.unchanged == {}


def test_all_of_the_text_is_read_however_sparse_the_rest():
    model = random(hunyuan)
    with accelerate(model, thr=0.2, densities=True) as report:
        sparse = speak(model, (5,))
        assert torch.equal(speak(model, (5,)), sparse)
        assert relative_difference(speak(model, (6,)), sparse) > 1e-3
    assert 0.05 < report.density < 0.9


def test_of_hunyuanvideo_the_image_to_video_model_is_taken_too():
    model = random(lambda: hunyuan(image_condition_type="token_replace"))
    expected = speak(model, (4, 6))
    with accelerate(model, thr=1.0):
        assert relative_difference(speak(model, (4, 6)), expected) < 1e-4


def test_joint_attention_by_another_sparse_engine_is_refused(monkeypatch):
    from k5kernels.attention.flex import Flex

    monkeypatch.setattr(Flex, "why_not", lambda *_: None)
    with pytest.raises(ValueError, match="attention='flex': attention over text too is sparse by 'nabla' alone"):
        accelerate(random(hunyuan), attention="flex")


def test_a_model_whose_order_of_tokens_is_not_known_is_refused_by_name():
    class HunyuanVideo15Transformer3DModel(torch.nn.Module):
        pass

    with pytest.raises(
        UnsupportedModelError, match=r"HunyuanVideo15Transformer3DModel: its attention .* attention=None"
    ):
        accelerate(HunyuanVideo15Transformer3DModel())


@pytest.fixture
def sr() -> Any:
    if not hasattr(diffusers, "Kandinsky6SRTransformer3DModel"):
        pytest.skip("this diffusers has no Kandinsky 6")
    return random(super_resolution)


@torch.no_grad()
def refine(model: Any, height: int, width: int, time: float = 500.0) -> Tensor:
    x = torch.randn(2, 2, height, width, 9, generator=torch.Generator().manual_seed(0))
    return model(x, torch.full((2,), time)).sample


def refine_densely(model: Any, height: int, width: int) -> Tensor:
    """By diffusers' own layers, with the tokens in rows and dense attention: what a mask of all blocks amounts to."""
    from diffusers.models.transformers.transformer_kandinsky6_sr import apply_rotary

    def attend(attn: Any, x: Tensor, rotations: Tensor, sparse_params: Any) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (attn.num_heads, -1)) for layer in (attn.to_query, attn.to_key, attn.to_value)
        )
        q, k = apply_rotary(attn.query_norm(q), rotations), apply_rotary(attn.key_norm(k), rotations)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return attn.out_layer(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x = torch.randn(2, 2, height, width, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        temb = model.time_embeddings(torch.full((2,), 500.0)) + model.pooled_bias
        positions = [torch.arange(side) for side in x.shape[1:4]]
        rotations = model.visual_rope_embeddings(positions, model.config.scale_factor).flatten(0, 2)
        tokens = model.visual_embeddings(x).flatten(1, 3)
        for block in model.visual_transformer_blocks:
            stock = block.self_attention.processor
            block.self_attention.set_processor(attend)
            tokens = block(tokens, temb, rotations, None)
            block.self_attention.set_processor(stock)
        return model.out_layer(tokens.unflatten(1, x.shape[1:4]), temb)


@pytest.mark.parametrize("size", [(8, 16), (9, 20), (5, 3)])
def test_super_resolution_runs_at_any_size(sr, size):
    expected = refine_densely(sr, *size)
    with leaves_no_trace_of(sr, run), accelerate(sr, attention="nabla", thr=1.0) as report:
        assert relative_difference(refine(sr, *size), expected) < 1e-4
    assert report.engines == {"nabla": 2}
    if size != (8, 16):
        with pytest.raises(ValueError, match="divisible by 8"):
            refine(sr, *size)


def test_super_resolution_is_dense_by_us_where_it_is_to_be_dense(sr):
    expected = refine_densely(sr, 9, 20)
    with accelerate(sr, attention="nabla", thr=0.1, dense_steps=1) as report:
        assert relative_difference(refine(sr, 9, 20), expected) < 1e-4
        assert relative_difference(refine(sr, 9, 20, time=300.0), expected) > 1e-3
    assert report.engines == {"dense": 2, "nabla": 2}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_super_resolution_at_any_size_is_compiled_as_it_is(sr, whole):
    torch._dynamo.reset()
    del sr.visual_transformer_blocks[1:]
    with accelerate(sr, attention="nabla", thr=0.3):
        expected = refine(sr, 9, 20)
        if whole:
            compiled = torch.compile(sr, backend="eager")
        else:
            sr.compile_repeated_blocks(backend="eager")
            compiled = sr
        assert relative_difference(refine(compiled, 9, 20), expected) < 1e-5


def test_a_cache_skips_blocks_of_super_resolution_at_any_size(sr):
    policy = MagCache({"cond": [1.0] * 9}, retention=0.0)
    with leaves_no_trace_of(sr, run), accelerate(sr, thr=0.3, cache=policy) as report:
        computed, cached = refine(sr, 9, 20), refine(sr, 9, 20, time=499.99)
    assert report.caches[0].skipped == 1
    assert relative_difference(cached, computed) < 1e-3
