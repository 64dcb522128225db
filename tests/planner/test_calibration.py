"""Calibration finds the coefficients again, predicts steps it did not see, and says what is wrong with a CSV."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner import H100, ClipShape, step_time_ms
from k5kernels.planner.calibration import MeasuredStep, fit, held_out_errors, predict_ms, read_steps, write_steps

MEASURED = Path(__file__).parents[2] / "bench" / "data" / "planner_sweep.csv"
MEAN_FLOOR, WORST_FLOOR = 0.12, 0.30

coefficient = st.floats(0.01, 1e4)


def synthetic(constant: float, tokens: float, width: float) -> list[MeasuredStep]:
    """Steps that follow the formula exactly."""
    profile = replace(H100, tokenwise_ms=constant, attention_ms=tokens, linear_ms=width)
    sizes = product((256, 1024, 4096), (1_000, 20_000, 100_000), ((8, 1), (32, 2)), (1.0, 0.3))
    steps = [MeasuredStep(d, s, *depth, density, 1.0) for d, s, depth, density in sizes]
    return [replace(step, step_ms=predict_ms(step, profile)) for step in steps]


@given(coefficient, coefficient, coefficient)
def test_steps_that_follow_the_formula_give_its_coefficients_back(constant, tokens, width):
    steps = synthetic(constant, tokens, width)
    profile = fit(steps, "found")
    assert all(predict_ms(step, profile) == pytest.approx(step.step_ms, rel=1e-6) for step in steps)
    assert profile.name == "found"
    assert max(errors.worst for errors in held_out_errors(steps)) < 1e-6


def test_a_dense_step_on_the_default_profile_is_the_reports():
    clip = ClipShape(512, 768, 121)
    step = MeasuredStep(1792, clip.tokens, 32, 2, 1.0, 1.0)
    assert predict_ms(step, H100) == pytest.approx(step_time_ms(1792, clip.pixels, 32, 2))


def test_density_scales_attention_alone():
    dense, half = (predict_ms(MeasuredStep(1792, 11_904, 1, 1, density, 1.0), H100) for density in (1.0, 0.5))
    assert dense - half == pytest.approx(14 / 2)


def test_a_coefficient_that_would_be_negative_is_zero():
    steps = [replace(step, step_ms=step.step_ms / step.tokens**0.4) for step in synthetic(1.0, 1.0, 1.0)]
    profile = fit(steps, "sublinear")
    assert profile.tokenwise_ms >= 0
    assert profile.attention_ms >= 0
    assert profile.linear_ms >= 0


def test_all_else_comes_from_the_base():
    base = replace(H100, memory_bytes=1e9, gpus_per_node=2)
    found = fit(synthetic(1.0, 2.0, 3.0), "small", base)
    assert (found.memory_bytes, found.gpus_per_node) == (1e9, 2)


@pytest.mark.parametrize("field", ["model_dim", "tokens"])
def test_steps_that_cannot_tell_the_coefficients_apart_are_refused(field):
    same = [replace(step, **{field: 1024}) for step in synthetic(1.0, 2.0, 3.0) if step.density == 1]
    with pytest.raises(ValueError, match="differ in tokens and in model_dim"):
        fit(same, "alike")


def test_two_steps_are_too_few():
    with pytest.raises(ValueError, match="at least 3 measured steps, got 2"):
        fit(synthetic(1.0, 2.0, 3.0)[:2], "few")


@pytest.mark.parametrize(
    ("row", "words"),
    [("256,1024,2,1,0.5,fast", "step_ms|fast"), ("256,1024,2,1,1.5,10", "density"), ("0,1024,2,1,1,10", "model_dim")],
)
def test_a_bad_row_is_named_with_its_line_and_column(tmp_path, row, words):
    path = tmp_path / "steps.csv"
    path.write_text(f"model_dim,tokens,blocks,batch,density,step_ms\n256,1024,2,1,1,10\n{row}\n")
    with pytest.raises(ValueError, match=words) as caught:
        read_steps(path)
    assert f"{path}:3" in str(caught.value)


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("model_dim,tokens\n256,1024\n")
    with pytest.raises(ValueError, match="none named blocks, batch, density, step_ms"):
        read_steps(path)


def test_steps_come_back_from_their_file(tmp_path):
    steps = synthetic(1.0, 2.0, 3.0)
    write_steps(tmp_path / "steps.csv", steps)
    assert read_steps(tmp_path / "steps.csv") == steps


def test_the_sweep_measured_with_the_trainer_is_predicted_from_any_third_of_it():
    steps = read_steps(MEASURED)
    assert len(steps) >= 24
    assert {step.density == 1 for step in steps} == {True, False}
    for errors in held_out_errors(steps):
        assert errors.steps == len(steps) * 2 // 3
        assert errors.mean <= MEAN_FLOOR
        assert errors.worst <= WORST_FLOOR
