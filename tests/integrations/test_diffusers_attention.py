"""A Kandinsky 5 model of diffusers with our attention: the same results, at any size, and no trace afterwards."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from small_crossdit import inputs, random_model, relative_difference
from small_kandinsky import GRID, ROPE_SCALE, call, generate, leaves_no_trace_of, pipeline, run, snapshot
from torch import Tensor, nn

from k5kernels.attention import EngineUnavailableError
from k5kernels.attention.break_even import BREAK_EVEN
from k5kernels.integrations.diffusers import Report, UnsupportedModelError, accelerate
from k5kernels.integrations.diffusers import models as ours
from k5kernels.token_layout import TokenLayout
from model.weights import config_to_json


@pytest.fixture
def stock_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds q and k to bfloat16 after the rotary embedding, in float32 too."""
    exact = ours.qk_norm_rope

    def rounded(*args: Any) -> tuple[Tensor, ...]:
        return tuple(x.bfloat16().to(x.dtype) for x in exact(*args))

    monkeypatch.setattr(ours, "qk_norm_rope", rounded)


def leaves_no_trace(model: nn.Module) -> AbstractContextManager[None]:
    return leaves_no_trace_of(model, run)


@pytest.mark.usefixtures("stock_rounding")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("engine", ["nabla", "native", "sdpa", "auto"])
def test_attention_that_keeps_everything_gives_the_stock_result(transformer, engine, batch):
    expected = run(transformer, batch)
    with accelerate(transformer, attention=engine, thr=1.0):
        assert relative_difference(run(transformer, batch), expected) < 1e-4


@pytest.mark.usefixtures("stock_rounding")
def test_tokens_that_fit_the_blocks_are_put_in_order_once_by_the_model(transformer, monkeypatch):
    expected = run(transformer, 2, grid=(3, 16, 32))
    asked = []
    permutation = TokenLayout.permutation
    monkeypatch.setattr(
        TokenLayout, "permutation", lambda layout, *device: asked.append(1) or permutation(layout, *device)
    )
    with accelerate(transformer, thr=1.0) as report:
        ours = run(transformer, 2, grid=(3, 16, 32))
        assert asked == []
        run(transformer, 2, grid=(3, 16, 34))
    assert len(asked) == 2
    assert report.engines == {"nabla": 4}
    assert relative_difference(ours, expected) < 1e-4


def test_in_that_order_dense_steps_are_the_stock_ones_too(transformer):
    expected = run(transformer, grid=(3, 16, 32), time=900.0)
    with accelerate(transformer, thr=0.1, dense_steps=1) as report:
        assert relative_difference(run(transformer, grid=(3, 16, 32), time=900.0), expected) < 1e-5
        run(transformer, grid=(3, 16, 32), time=500.0)
    assert report.engines == {"nabla": 2}


def test_the_order_of_tokens_changes_no_result(transformer, monkeypatch):
    with accelerate(transformer, thr=0.3):
        once = run(transformer, grid=(3, 16, 32))
    monkeypatch.setattr(TokenLayout, "full_blocks", False)
    with accelerate(transformer, thr=0.3):
        assert relative_difference(run(transformer, grid=(3, 16, 32)), once) < 1e-5


def test_without_the_stock_rounding_the_result_is_nearer_to_float32(transformer):
    expected = run(transformer)
    with accelerate(transformer, thr=1.0):
        assert 1e-5 < relative_difference(run(transformer), expected) < 1e-2


def test_a_sparse_pass_is_told_in_the_report(transformer):
    expected = run(transformer)
    with accelerate(transformer, thr=0.3, densities=True) as report:
        assert 1e-3 < relative_difference(run(transformer), expected) < 1
    assert sorted(report.densities) == [0, 1]
    assert 0.05 < report.density < 0.9
    assert report.engines == {"nabla": 2}
    assert f"density {report.density:.1%}" in str(report)


def test_a_report_knows_layers_steps_and_heads_and_draws_them(transformer, tmp_path):
    with pytest.raises(ValueError, match="no density"):
        Report().draw(tmp_path / "empty.png")
    with accelerate(transformer, thr=0.3, densities=True) as report:
        for time in (900.0, 600.0, 300.0):
            run(transformer, time=time)
    assert report.by_step().shape == (2, 3)
    assert report.by_head().shape == (2, 2)
    assert float(report.by_head().mean()) == pytest.approx(float(report.by_step().mean()), rel=1e-5)
    report.draw(tmp_path / "densities.png")
    assert (tmp_path / "densities.png").stat().st_size > 5000


def test_a_layer_can_have_a_threshold_of_its_own(transformer):
    with accelerate(transformer, thr=[1.0, 0.2], densities=True) as report:
        run(transformer)
    assert float(report.by_head()[0].mean()) == 1
    assert float(report.by_head()[1].mean()) < 0.9
    with pytest.raises(ValueError, match="one for each of 2 layers, got 3"):
        accelerate(transformer, thr=[0.5, 0.5, 0.5])


def test_auto_is_dense_on_a_short_small_clip_and_nabla_on_a_long_one(transformer):
    with accelerate(transformer, attention="auto") as report:
        run(transformer)
        assert report.engines == {"sdpa": 2}
        run(transformer, grid=(33, 2, 2))
    assert report.engines == {"sdpa": 2, "nabla": 2}


def test_auto_turns_to_dense_where_the_mask_is_too_dense_to_gain_by_it(transformer, monkeypatch):
    monkeypatch.setitem(BREAK_EVEN, "cpu", 0.5)
    with accelerate(transformer, attention="auto", thr=1.0) as report:
        for _ in range(2):
            run(transformer, grid=(33, 2, 2))
    assert report.engines == {"nabla": 2}
    assert report.unchanged == {"its mask was too dense to gain by it": 2}


def test_an_engine_that_is_not_there_is_refused_with_the_reason_and_what_can_run(transformer):
    before = snapshot(transformer)
    with pytest.raises(
        EngineUnavailableError, match=r"attention='flash4': it runs on CUDA.* here sdpa, native, nabla can"
    ):
        accelerate(transformer, attention="flash4")
    assert snapshot(transformer) == before


def test_the_first_steps_of_each_run_can_stay_as_they_are(transformer):
    dense = {time: run(transformer, time=time) for time in (900.0, 600.0, 300.0)}
    with accelerate(transformer, thr=0.1, dense_steps=2, densities=True) as report:
        for _ in range(2):  # runs
            for time in (900.0, 900.0, 600.0, 600.0):  # both branches of guidance
                assert torch.equal(run(transformer, time=time), dense[time])
            assert not torch.equal(run(transformer, time=300.0), dense[300.0])
    assert {step for steps in report.densities.values() for step in steps} == {2}
    assert sum(report.unchanged.values()) == 2 * 4 * 2


def test_nothing_is_left_behind(transformer):
    with leaves_no_trace(transformer):
        handle = accelerate(transformer, thr=0.5)
        run(transformer)
        handle.disable()
        handle.disable()


def test_nothing_is_left_behind_by_an_exception(transformer):
    with leaves_no_trace(transformer), pytest.raises(RuntimeError, match="midway"), accelerate(transformer):
        raise RuntimeError("midway")


def test_nested_accelerations_end_in_any_order(transformer):
    for first in (0, 1):
        with leaves_no_trace(transformer):
            handles = [accelerate(transformer, thr=0.5), accelerate(transformer, thr=0.2)]
            handles[first].disable()
            run(transformer)
            handles[1 - first].disable()


def test_two_models_of_one_class_do_not_know_of_each_other(transformer):
    other = Kandinsky5Transformer3DModel(**config_to_json(random_model().config)).eval()
    before = snapshot(other)
    with accelerate(transformer):
        assert snapshot(other) == before


def test_what_somebody_put_over_ours_stays_and_ours_does_nothing(transformer):
    class Theirs:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None,
                     rotary_emb: Any = None, sparse_params: Any = None) -> Tensor:  # fmt: skip
            return self.inner(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)

    expected = run(transformer)
    attention = transformer.visual_transformer_blocks[0].self_attention
    handle = accelerate(transformer, thr=0.1)
    theirs = Theirs(attention.processor)
    attention.set_processor(theirs)
    handle.disable()
    assert attention.processor is theirs
    assert torch.equal(run(transformer), expected)


@pytest.mark.parametrize(
    ("first", "whole", "grid"),
    [
        ("compiled", False, GRID),
        pytest.param("compiled", True, (3, 16, 32), marks=pytest.mark.slow),
        pytest.param("accelerated", False, (3, 16, 32), marks=pytest.mark.slow),
        pytest.param("accelerated", True, GRID, marks=pytest.mark.slow),
    ],
)
def test_compiled_before_or_after(transformer, first, whole, grid):
    torch._dynamo.reset()
    del transformer.visual_transformer_blocks[1:]

    def compile_it() -> Any:
        if whole:
            return torch.compile(transformer, backend="eager")
        transformer.compile_repeated_blocks(backend="eager")
        return transformer

    with accelerate(transformer, thr=0.3):
        expected = run(transformer, grid=grid)
    model = transformer
    if first == "compiled":
        model = compile_it()
        run(model, grid=grid)
    with accelerate(model, thr=0.3):
        if first == "accelerated":
            model = compile_it()
        assert relative_difference(run(model, grid=grid), expected) < 1e-5


def test_arguments_by_place_are_taken_as_by_name(transformer):
    x, time, text = inputs(1, GRID)
    positions = [torch.arange(side) for side in (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)]
    length = torch.arange(text.tokens.shape[1])
    by_place = (x, text.tokens, time, text.pooled, positions, length, ROPE_SCALE, {"to_fractal": True}, False)
    with accelerate(transformer, thr=0.3), torch.no_grad():
        assert torch.equal(transformer(*by_place), call(transformer, x, time, text))


def test_other_models_are_refused_by_name():
    with pytest.raises(
        UnsupportedModelError, match=r"expected a pipeline with one of Kandinsky5.*, got Linear: the order"
    ):
        accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"attention": "fast"}, "engine"), ({"thr": 2.0}, "thr"), ({"dense_steps": -1}, "dense_steps")],
)
def test_wrong_settings_are_refused_and_change_nothing(transformer, settings, words):
    before = snapshot(transformer)
    with pytest.raises(ValueError, match=words):
        accelerate(transformer, **settings)
    assert snapshot(transformer) == before


@pytest.mark.parametrize("size", [(48, 80), (64, 64)])
def test_a_pipeline_runs_at_any_size(transformer, size):
    pipe = pipeline(transformer, attention_type="nabla")
    with accelerate(pipe, thr=1.0, densities=True) as report:
        sparse = generate(pipe, *size)
    assert report.density == 1
    pipe.transformer.register_to_config(attention_type="regular")
    assert relative_difference(sparse, generate(pipe, *size)) < 1e-2


@pytest.mark.parametrize("first", [0, 1])
def test_nested_accelerations_of_a_pipeline_end_in_any_order(transformer, first):
    pipe = pipeline(transformer, attention_type="nabla")
    before, modules = dict(vars(pipe)), snapshot(transformer)
    handles = [accelerate(pipe), accelerate(pipe)]
    handles[first].disable()
    assert pipe.get_sparse_params(None, None) is None
    handles[1 - first].disable()
    assert dict(vars(pipe)) == before
    assert snapshot(transformer) == modules
