"""The memory formula (§7.3.2)."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner import MODELS, Memory, memory_bytes, memory_terms, parameters

LITE = {"model_dim": 1792, "time_dim": 512, "ff_dim": 7168, "blocks": 32}
LITE_10S_TOKENS = 93_696  # 61 latent frames of 32 × 48 tokens

configurations = st.fixed_dictionaries(
    {
        "model_dim": st.integers(1, 20_000),
        "time_dim": st.integers(1, 5_000),
        "ff_dim": st.integers(1, 80_000),
        "blocks": st.integers(1, 200),
        "tokens": st.integers(1, 10**7),
        "gpus": st.integers(1, 4096),
        "offload": st.booleans(),
    }
)
GROWING = ["model_dim", "time_dim", "ff_dim", "blocks", "tokens"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("image_lite", 5_832_704_000), ("video_lite", 1_908_408_320), ("video_pro", 18_371_051_520)],
)
def test_parameters_of_the_released_models(name, expected):
    shape = MODELS[name]
    assert parameters(shape.model_dim, shape.time_dim, shape.ff_dim, shape.blocks) == expected


def test_known_terms_of_video_lite_at_10_s_on_64_gpus():
    terms = memory_terms(**LITE, tokens=LITE_10S_TOKENS, gpus=64, offload=False)
    assert terms == Memory(
        states_bytes=12 * 1_908_408_320 / 64,
        gradients_bytes=4 * 1_908_408_320 / 64,
        block_inputs_bytes=187_392 * 57_344,
        block_activations_bytes=187_392 * 46_592,
    )
    assert terms.activations_bytes == 19_476_774_912
    assert memory_bytes(**LITE, tokens=LITE_10S_TOKENS, gpus=64, offload=False) == 357_826_560 + 19_476_774_912


def test_offload_takes_away_exactly_the_inputs_of_the_blocks():
    kept = memory_terms(**LITE, tokens=LITE_10S_TOKENS, gpus=64, offload=False)
    offloaded = memory_terms(**LITE, tokens=LITE_10S_TOKENS, gpus=64, offload=True)
    assert offloaded.block_inputs_bytes == 0
    assert kept.total_bytes - offloaded.total_bytes == kept.block_inputs_bytes == 10_745_806_848


def test_with_few_tokens_the_gradients_are_the_peak():
    terms = memory_terms(**LITE, tokens=64, gpus=1, offload=False)
    assert terms.activations_bytes < terms.gradients_bytes
    assert terms.total_bytes == 16 * 1_908_408_320


@given(configurations)
def test_the_memory_is_the_formula_of_the_report_to_the_last_digit(configuration):
    d, d_t, d_f = (configuration[name] for name in ("model_dim", "time_dim", "ff_dim"))
    share = Fraction(configuration["blocks"] * (9 * d_t * d + 8 * d**2 + 2 * d_f * d), configuration["gpus"])
    kept = 0 if configuration["offload"] else configuration["blocks"] * d
    activations = 2 * configuration["tokens"] * (kept + 18 * d + 2 * d_f)
    exact = 12 * share + max(4 * share, activations)
    assert memory_bytes(**configuration) == pytest.approx(float(exact), rel=4e-16)


@given(configurations, st.sampled_from(GROWING), st.integers(1, 1000))
def test_memory_never_falls_with_the_model_or_the_tokens(configuration, field, more):
    larger = configuration | {field: configuration[field] + more}
    assert memory_bytes(**larger) >= memory_bytes(**configuration)


@given(configurations, st.sampled_from(["model_dim", "time_dim", "ff_dim", "blocks"]), st.integers(1, 1000))
def test_memory_grows_with_every_size_of_the_model(configuration, field, more):
    larger = configuration | {field: configuration[field] + more}
    assert memory_bytes(**larger) > memory_bytes(**configuration)


@given(configurations, st.integers(1, 4096))
def test_memory_never_rises_with_gpus(configuration, more):
    assert memory_bytes(**configuration | {"gpus": configuration["gpus"] + more}) <= memory_bytes(**configuration)


@given(configurations)
def test_offload_never_costs_memory(configuration):
    with_offload = memory_bytes(**configuration | {"offload": True})
    assert with_offload <= memory_bytes(**configuration | {"offload": False})


@pytest.mark.parametrize("field", [*GROWING, "gpus"])
@pytest.mark.parametrize("value", [0, -1, True, "32", None, float("nan"), float("inf"), 10**30])
def test_bad_input_is_refused_by_name_with_what_came_and_what_is_allowed(field, value):
    good = LITE | {"tokens": LITE_10S_TOKENS, "gpus": 64, "offload": False}
    with pytest.raises(ValueError, match=rf"^{field}: expected .* got ") as caught:
        memory_bytes(**good | {field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_offload_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"^offload: expected True or False, got {value!r}"):
        memory_bytes(**LITE, tokens=64, gpus=1, offload=value)
