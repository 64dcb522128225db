"""Every pipeline of diffusers that the drop-in takes: stock, accelerated, cached, and exactly as before afterwards."""

from typing import Any

import diffusers
import pytest
import torch
from small_crossdit import relative_difference
from small_kandinsky import snapshot
from small_pipelines import CASES, STEPS, Case, generate

from k5kernels.cache import MagCache, MagCalibration
from k5kernels.integrations.diffusers import accelerate

SLOW = ("Kandinsky 6 SR",)  # stock takes seconds where its attention is not compiled


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    found = CASES[request.param]
    if not hasattr(diffusers, found.needs):
        pytest.skip(f"this diffusers has no {found.needs}")
    return found


def transformers(pipe: Any) -> list[Any]:
    return [model for name in ("transformer", "transformer_2") if (model := getattr(pipe, name, None)) is not None]


def test_a_pipeline_is_as_stock_with_everything_kept_skips_when_cached_and_is_restored(case):
    pipe = case.make()
    stock = generate(pipe, case)
    before = dict(vars(pipe))
    modules = [snapshot(model) for model in transformers(pipe)]
    with accelerate(pipe, attention="nabla", thr=1.0) as report:
        assert relative_difference(generate(pipe, case), stock) < 1e-2
    assert report.engines["nabla"] >= 2 * STEPS
    assert report.unchanged == {}
    policies = [MagCache({"cond": [1.0] * (STEPS - 1), "uncond": [1.0] * (STEPS - 1)}) for _ in transformers(pipe)]
    with accelerate(pipe, attention=None, cache=policies) as report:
        cached = generate(pipe, case)
    assert all(one.skipped for one in report.caches)
    assert 0 < relative_difference(cached, stock) < 1
    assert torch.equal(generate(pipe, case), stock)
    assert [snapshot(model) for model in transformers(pipe)] == modules
    assert vars(pipe).keys() == before.keys()


def test_each_of_two_transformers_is_calibrated_and_cached_over_its_own_steps():
    case = CASES["Wan 2.2"]
    pipe = case.make()
    measured = [MagCalibration(), MagCalibration()]
    with accelerate(pipe, attention=None, cache=measured):
        generate(pipe, case)
    steps = [len(one.ratios["cond"]) + 1 for one in measured]
    assert sum(steps) == STEPS
    policies = [MagCache(one.ratios, threshold=100.0, retention=0.0) for one in measured]
    with accelerate(pipe, attention=None, cache=policies) as report:
        generate(pipe, case)
    for policy, cache, own in zip(policies, report.caches, steps, strict=True):
        assert policy.steps == own
        assert [one.computed for one in cache.passes if one.branch == "cond"] == policy.schedule["cond"]
