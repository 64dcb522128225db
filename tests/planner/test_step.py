"""The step-time formula (§7.3.1)."""

from dataclasses import asdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner import StepTime, step_time_ms, step_time_terms

REFERENCE_PIXELS = 256 * 384 * 31

configurations = st.fixed_dictionaries(
    {
        "model_dim": st.integers(1, 20_000),
        "pixels": st.integers(1, 10**9),
        "blocks": st.integers(1, 200),
        "batch": st.integers(1, 20_000),
    }
)


def test_a_2b_model_at_the_reference_resolution_takes_928_ms():
    assert step_time_ms(1792, REFERENCE_PIXELS, blocks=32, batch=1) == 928


@pytest.mark.parametrize(
    ("model_dim", "pixels", "blocks", "batch", "expected"),
    [
        (1792, 2 * REFERENCE_PIXELS, 32, 1, 2 * (9 + 28 + 6) * 32),
        (3584, REFERENCE_PIXELS, 32, 1, 2 * (9 + 14 + 12) * 32),
        (3584, 2 * REFERENCE_PIXELS, 60, 3, 4 * (9 + 28 + 12) * 180),
        (1792, 512 * 768 * 61, 32, 1, 30_302_848 / 961),  # S/S0 = 244/31
    ],
)
def test_known_steps(model_dim, pixels, blocks, batch, expected):
    assert step_time_ms(model_dim, pixels, blocks, batch) == pytest.approx(expected, rel=1e-15)


def test_the_terms_at_the_reference_are_the_coefficients_times_the_blocks():
    terms = step_time_terms(1792, REFERENCE_PIXELS, blocks=32, batch=1)
    assert terms == StepTime(tokenwise_ms=9 * 32, attention_ms=14 * 32, linear_ms=6 * 32)


@given(configurations)
def test_the_step_is_the_formula_of_the_report_to_the_last_digit(configuration):
    d, s = Fraction(configuration["model_dim"], 1792), Fraction(configuration["pixels"], REFERENCE_PIXELS)
    exact = d * s * (9 + 14 * s + 6 * d) * configuration["blocks"] * configuration["batch"]
    assert step_time_ms(**configuration) == pytest.approx(float(exact), rel=4e-16)


@given(configurations)
def test_the_terms_add_up_to_the_step(configuration):
    terms = step_time_terms(**configuration)
    assert sum(asdict(terms).values()) == terms.total_ms == step_time_ms(**configuration)


@given(configurations, st.sampled_from(["model_dim", "pixels", "blocks", "batch"]), st.integers(1, 1000))
def test_the_step_and_all_its_terms_grow_with_every_input(configuration, field, more):
    larger = configuration | {field: configuration[field] + more}
    assert step_time_ms(**larger) > step_time_ms(**configuration)
    before, after = asdict(step_time_terms(**configuration)), asdict(step_time_terms(**larger))
    assert all(after[name] > before[name] for name in before)


@given(configurations, st.integers(2, 100))
def test_attention_alone_grows_with_the_square_of_the_pixels(configuration, times):
    before = step_time_terms(**configuration)
    after = step_time_terms(**configuration | {"pixels": configuration["pixels"] * times})
    assert after.attention_ms == pytest.approx(before.attention_ms * times**2)
    assert after.linear_ms == pytest.approx(before.linear_ms * times)
    assert after.tokenwise_ms == pytest.approx(before.tokenwise_ms * times)


def test_mean_pixels_and_mean_batches_may_be_fractions():
    assert step_time_ms(1792, REFERENCE_PIXELS, 32, 5.2) == pytest.approx(928 * 5.2)
    assert step_time_ms(1792, REFERENCE_PIXELS / 2, 32, 1) == pytest.approx(0.5 * (9 + 7 + 6) * 32)


@pytest.mark.parametrize("field", ["model_dim", "pixels", "blocks", "batch"])
@pytest.mark.parametrize("value", [0, -1, True, "32", None, float("nan"), float("inf"), 10**30])
def test_bad_input_is_refused_by_name_with_what_came_and_what_is_allowed(field, value):
    good = {"model_dim": 1792, "pixels": REFERENCE_PIXELS, "blocks": 32, "batch": 1}
    with pytest.raises(ValueError, match=rf"^{field}: expected .* got ") as caught:
        step_time_ms(**good | {field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("field", ["model_dim", "blocks"])
def test_dims_and_blocks_are_integers(field):
    good = {"model_dim": 1792, "pixels": REFERENCE_PIXELS, "blocks": 32, "batch": 1}
    with pytest.raises(ValueError, match=rf"^{field}: expected an integer .* got 1\.5"):
        step_time_ms(**good | {field: 1.5})
