"""A cache in a pipeline of diffusers: its branches and steps, what else is on, and what is left afterwards."""

from typing import Any

import diffusers
import pytest
import torch
from small_crossdit import inputs, relative_difference
from small_kandinsky import GRID, call, leaves_no_trace_of, pipeline, run, snapshot
from torch import Tensor

from k5kernels.cache import MagCache, MagCalibration
from k5kernels.integrations.diffusers import accelerate
from k5kernels.text_condition import TextCondition

STEPS = 10
RELEASE = tuple(int(part) for part in diffusers.__version__.split(".")[:2])


def policy(**settings: Any) -> MagCache:
    return MagCache({"cond": [1.0] * (STEPS - 1), "uncond": [1.0] * (STEPS - 1)}, **settings)


def generate(pipe: Any, steps: int = STEPS, **settings: Any) -> Tensor:
    _, _, text = inputs(1, GRID)
    _, _, negative = inputs(1, GRID, seed=2)
    given = {
        "prompt_embeds_qwen": text.tokens,
        "prompt_embeds_clip": text.pooled,
        "prompt_cu_seqlens": torch.tensor([0, text.tokens.shape[1]]),
        "negative_prompt_embeds_qwen": negative.tokens,
        "negative_prompt_embeds_clip": negative.pooled,
        "negative_prompt_cu_seqlens": torch.tensor([0, text.tokens.shape[1]]),
        "guidance_scale": 3.0,
    }
    return pipe(
        prompt=["one"], height=32, width=48, num_frames=5, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(0), **given | settings,
    ).frames  # fmt: skip


def schedule(report: Any, branch: str) -> list[bool]:
    return [one.computed for one in report.caches[0].passes if one.branch == branch]


@pytest.fixture
def pipe(transformer) -> Any:
    made = pipeline(transformer, attention_type="regular")
    made.encode_prompt = None  # never asked for: the embeddings are given
    return made


@pytest.mark.parametrize("steps", [STEPS, 7])
def test_both_branches_follow_their_schedule_run_after_run(pipe, steps):
    cache = policy()
    with accelerate(pipe, attention=None, cache=cache) as report:
        first, second = generate(pipe, steps), generate(pipe, steps)
    assert torch.equal(first, second)
    assert not all(cache.schedule["cond"])
    for branch in ("cond", "uncond"):
        assert schedule(report, branch) == cache.schedule[branch] * 2
    assert len(cache.schedule["cond"]) == steps


def test_a_cache_that_skips_nothing_changes_nothing(pipe):
    plain = generate(pipe)
    with accelerate(pipe, attention=None, cache=policy(threshold=0.0)):
        assert torch.equal(generate(pipe), plain)


def test_nothing_of_it_is_left(pipe, transformer):
    generate(pipe)
    before = dict(vars(pipe))
    with leaves_no_trace_of(transformer, run), accelerate(pipe, thr=1.0, cache=policy()):
        generate(pipe)
    assert dict(vars(pipe)).keys() == before.keys()


def test_an_interrupted_run_does_not_leak_into_the_next(pipe):
    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with accelerate(pipe, attention=None, cache=policy()):
        clean = generate(pipe)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=[])
        assert torch.equal(generate(pipe), clean)


def test_without_guidance_there_is_one_branch(pipe):
    with accelerate(pipe, attention=None, cache=policy()) as report:
        generate(pipe, guidance_scale=1.0)
    assert {one.branch for one in report.caches[0].passes} == {"cond"}


def test_guidance_can_be_switched_off_and_on_midway(pipe):
    """Each branch follows its own schedule; where it was away too long to reuse what it has, it is computed."""

    def switch(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if 3 <= step < 5 else 3.0  # of the step after this one
        return {}

    switched = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": []}
    plain = generate(pipe, **switched)
    cache = policy()
    with accelerate(pipe, attention=None, cache=cache) as report:
        ours = generate(pipe, **switched)
    passes = report.caches[0].passes
    assert schedule(report, "cond") == cache.schedule["cond"]
    there = [step for step in range(STEPS) if not 4 <= step < 6]
    assert [one.step for one in passes if one.branch == "uncond"] == there
    computed = {one.step for one in passes if one.branch == "uncond" and one.computed}
    assert cache.schedule["uncond"][4:7] == [True, False, False]
    assert 6 in computed  # what it was to reuse, of step 4, it does not have
    assert relative_difference(ours, plain) < 0.5
    with accelerate(pipe, attention=None, cache=policy(threshold=0.0)):
        assert torch.equal(generate(pipe, **switched), plain)


def test_of_a_second_order_sampler_only_first_evaluations_are_skipped(pipe):
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with accelerate(pipe, attention=None, cache=policy()) as report:
        generate(pipe)
    passes = report.caches[0].passes
    assert len(passes) == 2 * (2 * STEPS - 1)
    seconds = [one for one in passes if one.reason.startswith("a second")]
    assert len(seconds) == 2 * (STEPS - 1)
    assert report.caches[0].skipped == sum(not one for one in policy().schedule["cond"]) * 2


def test_the_names_a_pipeline_gives_to_its_passes_are_read(transformer):
    with accelerate(transformer, attention=None, cache=policy()) as report:
        with transformer.cache_context("uncond"):
            run(transformer, time=900.0)
        with transformer.cache_context("cond"):
            run(transformer, time=900.0)
    assert [one.branch for one in report.caches[0].passes] == ["uncond", "cond"]
    assert all(one.reason == "as scheduled" for one in report.caches[0].passes)


@pytest.mark.skipif(RELEASE < (0, 37), reason="diffusers 0.36 has no cache that Kandinsky 5 takes")
def test_diffusers_own_cache_is_refused_while_ours_is_on_and_the_other_way_round(transformer):
    config = diffusers.FirstBlockCacheConfig()
    with accelerate(transformer, attention=None, cache=policy()), pytest.raises(ValueError, match="k5kernels is on"):
        transformer.enable_cache(config)
    transformer.enable_cache(config)
    before = snapshot(transformer)
    with pytest.raises(ValueError, match="disable_cache"):
        accelerate(transformer, cache=policy())
    assert snapshot(transformer) == before


def test_a_calibration_measures_what_a_cache_loads(pipe, tmp_path):
    calibration = MagCalibration()
    plain = generate(pipe)
    with accelerate(pipe, attention=None, cache=calibration):
        assert torch.equal(generate(pipe), plain)
    calibration.save(tmp_path / "ratios.json")
    cache = MagCache.load(tmp_path / "ratios.json", threshold=1.0)
    assert cache.steps == STEPS
    with accelerate(pipe, attention=None, cache=cache) as report:
        assert relative_difference(generate(pipe), plain) < 0.5
    assert report.caches[0].skipped > 4


def test_a_model_without_released_ratios_is_told_what_to_do(transformer):
    with pytest.raises(ValueError, match="MagCalibration"):
        accelerate(transformer, cache="magcache")
    with pytest.raises(ValueError, match="expected 'magcache', a policy or one of"):
        accelerate(transformer, cache="teacache")
    with accelerate(transformer, attention=None, cache="lite_t2v_5s_sft_sd") as report:
        run(transformer)
    assert "ratios of lite_t2v_5s_sft_sd" in str(report)


@pytest.mark.parametrize("first", ["compiled", "accelerated"])
def test_no_block_runs_eager_that_was_compiled(transformer, first):
    torch._dynamo.reset()
    ran: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run_graph(*args: Any) -> Any:
            ran.append("compiled")
            return graph(*args)

        return run_graph

    def passes() -> None:
        for time in (900.0, 800.0, 700.0, 600.0):
            run(transformer, time=time)

    cache = policy(retention=0.0)
    if first == "compiled":
        transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    with accelerate(transformer, attention=None, cache=cache) as report:
        if first == "accelerated":
            transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
        passes()
    computed = 4 - report.caches[0].skipped
    assert computed == 2
    # A text block runs on every pass, the two visual blocks on the computed ones.
    assert len(ran) == 4 + 2 * computed


@pytest.mark.skipif(
    RELEASE < (0, 42) and torch.accelerator.current_accelerator() is None,
    reason="group offload of diffusers before 0.42 needs a GPU",
)
def test_blocks_that_are_skipped_are_not_loaded_by_group_offload(transformer, monkeypatch):
    from diffusers.hooks import apply_group_offloading
    from diffusers.hooks.group_offloading import ModuleGroup

    blocks, loaded, onload = set(transformer.visual_transformer_blocks), [], ModuleGroup.onload_

    def noted(group: Any) -> None:
        loaded.extend(module for module in group.modules if module in blocks)
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", noted)
    cpu = torch.device("cpu")
    apply_group_offloading(transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    plain = [run(transformer, time=time) for time in (900.0, 800.0)]
    assert len(loaded) == 2 * len(blocks)
    loaded.clear()
    with accelerate(transformer, thr=1.0, cache=policy(retention=0.0)) as report:
        ours = [run(transformer, time=time) for time in (900.0, 800.0)]
    assert report.caches[0].skipped == 1
    assert len(loaded) == len(blocks)
    assert relative_difference(ours[0], plain[0]) < 1e-2


@pytest.mark.skipif(RELEASE < (0, 37), reason="in diffusers 0.36 Kandinsky 5 itself does not run so")
def test_a_model_loaded_in_bfloat16_keeps_its_layers_of_float32(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    model = type(transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    x, time, text = inputs(1, GRID)
    text = TextCondition(text.tokens.bfloat16(), None, text.pooled.bfloat16())
    with torch.no_grad():
        expected = call(model, x.bfloat16(), time, text)
        with accelerate(model, thr=1.0, cache=policy()):
            assert relative_difference(call(model, x.bfloat16(), time, text), expected) < 2e-2
