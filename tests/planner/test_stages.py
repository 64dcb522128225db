"""Table 4 and what its stages cost."""

from dataclasses import replace

import pytest

from k5kernels.planner import H100, MODELS, ClipShape, step_time_ms
from k5kernels.planner.density import nabla_density
from k5kernels.planner.stages import stage, stage_costs, stages
from k5kernels.planner.workload import Workload

CLIP = ClipShape(512, 768, 121)


def test_table_4_has_the_stages_of_three_models():
    assert len(stages()) == 14
    assert {model for model, _ in stages().values()} == set(MODELS)
    mix = stage("video_pro_mr")
    assert (mix.steps, mix.batch, mix.nabla_thr) == (45_000, 1331, None)
    assert {(clip.height, clip.width): weight for clip, weight in mix.clips} == {
        (512, 512): 0.28,
        (512, 768): 0.25,
        (768, 512): 0.47,
    }


@pytest.mark.parametrize("name", ["video_lite_mr_10s", "video_pro_hr_5s", "video_pro_hr_10s"])
def test_long_and_high_resolution_stages_train_with_nabla(name):
    assert stage(name).nabla_thr is not None


def test_the_cost_of_a_stage_is_the_formulas_on_its_mix():
    mix = stage("video_lite_mr_5s")
    shape = MODELS["video_lite"]
    weights = sum(weight for _, weight in mix.clips)
    clip_ms = sum(
        weight / weights * step_time_ms(shape.model_dim, clip.pixels, shape.blocks, 1) for clip, weight in mix.clips
    )
    (cost,) = (cost for cost in stage_costs("video_lite", gpus=128) if cost.stage == "video_lite_mr_5s")
    assert cost.step_s == pytest.approx(clip_ms * mix.batch / 1e3 / 128)
    assert cost.gpu_hours == pytest.approx(cost.step_s * mix.steps / 3600 * 128)
    assert cost.days == pytest.approx(cost.step_s * mix.steps / 86_400)
    assert (cost.nabla_step_s, cost.nabla_gpu_hours) == (cost.step_s, cost.gpu_hours)


def test_nabla_saves_the_attention_of_the_blocks_it_leaves_out():
    (cost,) = (cost for cost in stage_costs("video_pro") if cost.stage == "video_pro_hr_10s")
    attention, rest = stage("video_pro_hr_10s").clip_time_ms()
    density = nabla_density(0.7)
    assert cost.nabla_density == density < 0.5
    assert cost.nabla_step_s / cost.step_s == pytest.approx((density * attention + rest) / (attention + rest))


def test_weights_that_do_not_sum_to_one_are_shares():
    one, other = (Workload(MODELS["video_lite"], ((CLIP, weight),), 8) for weight in (0.1, 1.0))
    assert one.clip_time_ms() == other.clip_time_ms()
    assert one.mean_tokens == CLIP.tokens


def test_more_gpus_take_fewer_days_and_the_same_gpu_hours():
    for few, many in zip(stage_costs(gpus=64), stage_costs(gpus=256), strict=True):
        assert few.gpu_hours == pytest.approx(many.gpu_hours)
        assert few.days == pytest.approx(4 * many.days)


def test_an_unknown_stage_or_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"stage: expected one of image_lite_lr, .* got 'pro'"):
        stage("pro")
    with pytest.raises(ValueError, match="model: expected one of image_lite, video_lite, video_pro, got 'pro'"):
        stage_costs("pro")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch", 0, "batch: expected"),
        ("steps", 1.5, "steps: expected"),
        ("nabla_thr", 2, "nabla_thr: expected"),
        ("clips", (), "clips: expected at least one"),
        ("clips", ((CLIP, 0.0),), "weight of a clip: expected"),
    ],
)
def test_a_field_of_a_workload_that_cannot_be_is_named(field, value, words):
    with pytest.raises(ValueError, match=words):
        replace(Workload(MODELS["video_lite"], ((CLIP, 1.0),), 8), **{field: value})


def test_stages_on_a_profile_half_as_fast_cost_twice_as_much():
    slow = replace(H100, tokenwise_ms=18, attention_ms=28, linear_ms=12)
    for fast, twice in zip(stage_costs(), stage_costs(profile=slow), strict=True):
        assert twice.gpu_hours == pytest.approx(2 * fast.gpu_hours)
