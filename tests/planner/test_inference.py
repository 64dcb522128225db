"""Generations: Table 5 predicted from its other rows, and how time and memory follow from what is asked."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.cache import MagCache
from k5kernels.planner import H100, MODELS, ClipShape, text_encoder
from k5kernels.planner.inference import (
    MAGCACHE_SKIPPED,
    Generation,
    fit,
    generation_memory,
    generation_time,
    leave_one_out,
    mean_errors,
    table5,
    table5_rates,
)
from k5kernels.planner.quantization import WEIGHT_BYTES
from k5kernels.presets import RELEASED

FLOOR = 0.15
CLIP = ClipShape(512, 768, 121)
PRO = Generation(MODELS["video_pro"], CLIP)

models = st.sampled_from(list(MODELS.values()))
clips = st.builds(
    lambda h, w, groups: ClipShape(16 * h, 16 * w, 1 + 4 * groups),
    st.integers(8, 80),
    st.integers(8, 80),
    st.integers(1, 60),
)
generations = st.builds(
    Generation,
    models,
    clips,
    st.integers(1, 200),
    st.none() | st.floats(0.1, 1),
    st.floats(0, 0.9),
    st.booleans(),
    st.sampled_from(list(WEIGHT_BYTES)),
    st.integers(0, 30),
)
cards = st.floats(1, 200).map(lambda gib: gib * 2**30)


def test_every_row_of_table_5_is_predicted_from_the_others_within_the_floor_on_average():
    held_out = leave_one_out()
    assert [each.row for each in held_out] == list(table5())
    assert len(held_out) == 13
    time, memory = mean_errors(held_out)
    assert time <= FLOOR
    assert memory <= FLOOR


def test_a_held_out_row_does_not_help_its_own_prediction():
    row = table5()[0]
    doubled = replace(row, seconds=2 * row.seconds)
    others = table5()[1:]
    assert fit(others) != fit((*others, doubled)) != fit(table5())
    (first, *_) = leave_one_out()
    assert first.seconds == generation_time(row.generation, fit(others)).total_s


def test_times_that_follow_the_terms_give_their_rates_back():
    known = replace(table5_rates(), linear_flops_per_s=3e14, attention_flops_per_s=2e14, offload_bytes_per_s=4e9)
    rows = tuple(replace(row, seconds=generation_time(row.generation, known).total_s) for row in table5())
    found = fit(rows)
    for rate in ("linear_flops_per_s", "attention_flops_per_s", "offload_bytes_per_s"):
        assert getattr(found, rate) == pytest.approx(getattr(known, rate), rel=1e-6)


def test_the_fitted_rates_are_those_of_an_h100():
    rates = table5_rates()
    for rate in (rates.linear_flops_per_s, rates.attention_flops_per_s):
        assert 1e14 < rate < 989e12  # dense bfloat16 of the data sheet
    assert all(getattr(rates, field.name) > 0 for field in fields(rates))


@given(generations)
def test_time_is_positive_and_grows_with_evaluations(generation):
    time = generation_time(generation)
    assert 0 < time.total_s < math.inf
    assert generation_time(replace(generation, nfe=generation.nfe + 1)).total_s > time.total_s


@given(generations)
def test_what_saves_computation_saves_time(generation):
    dense = replace(generation, nabla_thr=None, skipped=0.0)
    assert generation_time(generation).total_s <= generation_time(dense).total_s


@given(generations)
def test_offload_never_costs_memory_and_always_time(generation):
    on, off = replace(generation, offload=True), replace(generation, offload=False)
    assert generation_memory(on).total_bytes <= generation_memory(off).total_bytes * (1 + 1e-12)
    assert generation_time(on).total_s > generation_time(off).total_s


@given(generations)
def test_a_longer_clip_takes_more_time_and_no_less_memory(generation):
    clip = generation.clip
    longer = replace(generation, clip=replace(clip, frames=clip.frames + 4))
    assert generation_time(longer).total_s > generation_time(generation).total_s
    assert generation_memory(longer).total_bytes >= generation_memory(generation).total_bytes


def test_without_offload_every_part_stays_resident():
    lite = Generation(MODELS["video_lite"], CLIP)
    weights = text_encoder.STORED_BYTES + 2 * lite.model.parameters
    offloaded, resident = (generation_memory(replace(lite, offload=offload)) for offload in (True, False))
    assert offloaded.total_bytes == offloaded.decode_bytes == pytest.approx(21e9)
    assert resident.total_bytes == pytest.approx(21e9 + weights)
    assert resident.total_bytes / 1e9 == pytest.approx(41.4, abs=0.05)


@given(generations, cards)
def test_the_parts_and_what_waits_beside_them_are_the_total(generation, card):
    memory = generation_memory(generation, card_bytes=card)
    largest = max(memory.text_bytes, memory.blocks_bytes, memory.decode_bytes)
    assert memory.total_bytes == pytest.approx(largest + memory.resident_bytes)
    if generation.offload:
        assert memory.resident_bytes == 0


@given(generations)
def test_a_smaller_text_encoder_never_costs_memory_or_time(generation):
    large, small = (replace(generation, text_encoder_dtype=dtype) for dtype in ("bfloat16", "nf4"))
    assert generation_memory(small).total_bytes <= generation_memory(large).total_bytes * (1 + 1e-12)
    assert generation_time(small).total_s <= generation_time(large).total_s


def test_the_text_encoder_keeps_its_embeddings_in_bfloat16():
    assert text_encoder.stored_bytes("bfloat16") == text_encoder.STORED_BYTES
    layers = text_encoder.STORED_PARAMETERS - text_encoder.EMBEDDINGS
    assert text_encoder.stored_bytes("int8") == layers + 2 * text_encoder.EMBEDDINGS
    assert text_encoder.stored_bytes("nf4") / 1e9 == pytest.approx(5.9, abs=0.05)


def test_swapped_blocks_take_no_memory_and_are_fetched_in_every_pass():
    swapped = replace(PRO, swapped=30)
    saved = generation_memory(PRO).total_bytes - generation_memory(swapped).total_bytes
    assert saved == pytest.approx(PRO.weights_bytes / 2)
    slow = replace(H100, host_bytes_per_s=1e9)
    time = generation_time(swapped, profile=slow)
    fetching = 100 * PRO.weights_bytes / 2 / 1e9
    assert time.swap_s == pytest.approx(fetching - time.linear_s - time.attention_s)
    assert generation_time(swapped).swap_s == 0  # hidden behind the passes


def test_on_a_machine_twice_as_fast_computation_takes_half_and_offload_the_same():
    fast = replace(H100, tokenwise_ms=4.5, attention_ms=7, linear_ms=3)
    here, there = generation_time(PRO), generation_time(PRO, profile=fast)
    assert there.linear_s == pytest.approx(here.linear_s / 2)
    assert there.attention_s == pytest.approx(here.attention_s / 2)
    assert there.offload_s == here.offload_s


def test_magcache_skips_what_the_released_ratios_skip():
    skipped = []
    for settings in RELEASED.values():
        if settings.mag_ratios is not None:
            schedules = MagCache.from_released(settings.mag_ratios, settings.num_steps).schedule.values()
            skipped += [schedule.count(False) / len(schedule) for schedule in schedules]
    assert sorted(skipped)[len(skipped) // 2] == MAGCACHE_SKIPPED
    assert max(abs(share - MAGCACHE_SKIPPED) for share in skipped) < 0.021


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nfe", 0),
        ("nabla_thr", 1.5),
        ("nabla_thr", 0),
        ("skipped", 1.0),
        ("skipped", -0.1),
        ("offload", 1),
        ("text_encoder_dtype", "'int4'"),
        ("swapped", 59),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .* got {value}"):
        replace(PRO, **{field: value.strip("'") if isinstance(value, str) else value})


@pytest.mark.parametrize("card", [0, -1.0, math.nan, math.inf, "80"])
def test_a_card_that_cannot_be_is_refused(card):
    with pytest.raises(ValueError, match="card_bytes: expected a number above 0"):
        generation_memory(PRO, card_bytes=card)
