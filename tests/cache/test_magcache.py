"""MagCache: which steps run, what a skipped step gives, and what state survives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k5kernels.cache import MagCache, MagCalibration
from k5kernels.cache.schedule import compute_schedule, resample_ratios, reuse_errors, speedup_of
from k5kernels.presets import RELEASED

THRESHOLD, MAX_SKIPS, RETENTION = 0.12, 2, 0.2
ratio_lists = st.lists(st.floats(0.7, 1.3), min_size=0, max_size=60)


def restated_schedule(ratios, threshold, max_skips, retention):
    """The rule said again from the steps themselves: sums and products over runs, nothing accumulated."""
    magnitude = [1.0, *ratios]
    computed = [0]
    for step in range(1, len(magnitude)):
        last = computed[-1]
        since = range(max(last + 1, math.ceil(round(retention * len(magnitude), 9))), step + 1)
        error = sum(abs(1 - math.prod(magnitude[since.start : end + 1])) for end in since)
        if len(since) == 0 or len(since) > max_skips or error >= threshold or step == len(magnitude) - 1:
            computed.append(step)
    return [step in computed for step in range(len(magnitude))]


@given(ratio_lists, st.floats(0, 0.5), st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]))
def test_schedule_is_what_the_rule_says(ratios, threshold, max_skips, retention):
    expected = restated_schedule(ratios, threshold, max_skips, retention)
    assert compute_schedule(ratios, threshold, max_skips, retention) == expected


@given(ratio_lists)
@settings(max_examples=40, deadline=None)
def test_schedule_agrees_with_diffusers(ratios):
    """Its hook, driven over two blocks, up to the last step, which runs here.

    Retention 0.2 of a multiple of five steps, where both round alike.
    """
    steps = len(ratios) + 1 - (len(ratios) + 1) % 5
    if steps == 0:
        return
    ours = compute_schedule(ratios[: steps - 1], THRESHOLD, MAX_SKIPS, RETENTION)
    assert ours == [*diffusers_schedule([1.0, *ratios[: steps - 1]])[:-1], True]


def diffusers_schedule(ratios):
    hooks = pytest.importorskip("diffusers.hooks.mag_cache", reason="needs a diffusers that has MagCache")
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            ran.append(True)
            return hidden_states + 1

    class Transformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer_blocks = torch.nn.ModuleList([Block(), Block()])

    ran: list[bool] = []
    TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))
    config = hooks.MagCacheConfig(
        threshold=math.nextafter(THRESHOLD, 0),  # it skips at the threshold itself, the rule below it
        max_skip_steps=MAX_SKIPS,
        retention_ratio=RETENTION,
        num_inference_steps=len(ratios),
        mag_ratios=torch.tensor(ratios, dtype=torch.float64),
    )
    transformer = Transformer()
    hooks.apply_mag_cache(transformer, config)
    schedule = []
    for _ in ratios:
        ran.clear()
        first, last = transformer.transformer_blocks
        last(first(torch.zeros(1, 2, 3)))
        schedule.append(bool(ran))
    return schedule


def test_steady_ratios_skip_two_of_three_after_retention():
    schedule = compute_schedule([1.01] * 49, THRESHOLD, MAX_SKIPS, RETENTION)
    assert schedule[:10] == [True] * 10
    assert schedule[10:16] == [False, False, True, False, False, True]


@pytest.mark.parametrize("steps", [5, 10, 15, 25, 35, 45, 50])
def test_retention_is_a_share_of_the_steps_without_rounding_up_on_whole_numbers(steps):
    assert compute_schedule([1.0] * (steps - 1), THRESHOLD, MAX_SKIPS, RETENTION).index(False) == steps // 5


def test_the_first_step_runs_even_without_retention():
    assert compute_schedule([1.0] * 9, THRESHOLD, MAX_SKIPS, 0.0)[:4] == [True, False, False, True]


@given(ratio_lists)
def test_ratios_for_their_own_number_of_steps_are_themselves(ratios):
    assert resample_ratios(ratios, len(ratios) + 1) == ratios


def test_ratios_over_longer_steps_multiply():
    assert resample_ratios([1.01] * 48, 25) == pytest.approx([1.01**2] * 24)
    assert resample_ratios([1.1, 0.9, 1.2, 1.3], 3) == pytest.approx([1.1 * 0.9, 1.2 * 1.3])
    assert resample_ratios([1.44], 3) == pytest.approx([1.2, 1.2])


@given(st.lists(st.floats(0.7, 1.3), min_size=1, max_size=60), st.integers(2, 100))
def test_resampled_ratios_lead_to_the_same_magnitude(ratios, steps):
    resampled = resample_ratios(ratios, steps)
    assert len(resampled) == steps - 1
    assert math.prod(resampled) == pytest.approx(math.prod(ratios))


def test_a_run_of_one_step_has_no_ratio():
    assert resample_ratios([1.1, 0.9], 1) == []


class Blocks:
    """Adds a residual that differs from call to call, and counts the calls."""

    def __init__(self, scale=1.0):
        self.calls, self.scale = 0, scale

    def __call__(self, x):
        self.calls += 1
        return x + self.scale * self.calls


def run(branch, blocks, steps, start=0):
    return [branch(blocks, torch.full((1, 2, 3), float(step))) for step in range(start, steps)]


def test_a_skipped_step_adds_the_last_computed_residual():
    cache = MagCache({"cond": [1.0] * 9}, retention=0.0)
    outputs = run(cache.branch("cond"), Blocks(), 10)
    residuals = [float(out[0, 0, 0]) - step for step, out in enumerate(outputs)]
    assert residuals == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert cache.schedule == {"cond": [True, False, False] * 3 + [True]}


def test_branches_keep_separate_ratios_steps_and_residuals():
    cache = MagCache({"cond": [1.0] * 5, "uncond": [2.0] * 5}, retention=0.0)
    cond, uncond = Blocks(), Blocks(scale=100.0)
    for step in range(5):
        x = torch.zeros(1, 2, 3)
        cond_out = cache.branch("cond")(cond, x)
        uncond_out = cache.branch("uncond")(uncond, x)
        assert float(cond_out[0, 0, 0]) == 1 + step // 3
        assert float(uncond_out[0, 0, 0]) == 100 * (step + 1)
    assert (cond.calls, uncond.calls) == (2, 5)


def test_a_threshold_of_zero_computes_every_step_and_changes_nothing():
    cache = MagCache({"cond": [1.0] * 9}, threshold=0.0)
    blocks = Blocks()
    assert torch.equal(torch.stack(run(cache.branch("cond"), blocks, 10)), torch.stack(run(_plain, Blocks(), 10)))
    assert blocks.calls == 10


def _plain(blocks, x):
    return blocks(x)


def test_a_second_run_repeats_the_first():
    cache = MagCache({"cond": [1.0] * 9}, retention=0.0)
    first = run(cache.branch("cond"), Blocks(), 10)
    assert torch.equal(torch.stack(first), torch.stack(run(cache.branch("cond"), Blocks(), 10)))


def test_after_an_interruption_reset_begins_a_clean_run():
    cache = MagCache({"cond": [1.0] * 9}, retention=0.0)
    clean = run(cache.branch("cond"), Blocks(), 10)
    run(cache.branch("cond"), Blocks(scale=7.0), 5)
    cache.reset()
    assert torch.equal(torch.stack(clean), torch.stack(run(cache.branch("cond"), Blocks(), 10)))


def test_a_run_of_another_shape_without_reset_is_refused():
    cache = MagCache({"cond": [1.0] * 9}, retention=0.0)
    cache.branch("cond")(Blocks(), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="reset"):
        cache.branch("cond")(Blocks(), torch.zeros(1, 4, 3))


def test_reset_to_another_number_of_steps_resamples_the_calibrated_ratios():
    ratios = [1.0 + 0.01 * index for index in range(49)]
    cache = MagCache({"cond": ratios})
    cache.reset(20)
    cache.reset(50)
    assert cache.schedule["cond"] == compute_schedule(ratios, THRESHOLD, MAX_SKIPS, RETENTION)
    cache.reset(25)
    assert len(cache.schedule["cond"]) == 25


def run_steps(branch, blocks, steps):
    """Residuals that the steps given add, and the number of them that ran the blocks."""
    before = blocks.calls
    outputs = [branch(blocks, torch.zeros(1, 2, 3), step=step) for step in steps]
    return [float(out[0, 0, 0]) for out in outputs], blocks.calls - before


def test_steps_given_in_order_are_the_steps_counted():
    counted, given = (MagCache({"cond": [1.01] * 19}, retention=0.2).branch("cond") for _ in range(2))
    expected = [float(counted(blocks, torch.zeros(1, 2, 3))[0, 0, 0]) for blocks in [Blocks()] for _ in range(20)]
    assert run_steps(given, Blocks(), range(20))[0] == expected


@pytest.mark.parametrize(
    ("steps", "residuals"),
    [
        ([0, 1, 2, 5, 6, 7], [1, 1, 1, 2, 3, 3]),  # 3 computes and was left out: 5 runs in its place
        ([4, 5, 6], [1, 1, 2]),  # nothing before: 4 runs, 5 reuses it
        ([0, 2, 3, 5], [1, 1, 2, 2]),  # a reused step left out costs nothing
        ([0, 3, 6], [1, 2, 3]),
        ([1, 4, 7], [1, 2, 3]),
    ],
)
def test_a_branch_on_part_of_the_steps_runs_where_the_residual_it_counts_on_is_missing(steps, residuals):
    cache = MagCache({"cond": [1.0] * 9}, retention=0.0)
    assert cache.schedule["cond"] == [True, False, False] * 3 + [True]
    assert run_steps(cache.branch("cond"), Blocks(), steps) == (residuals, max(residuals))


@given(
    st.sets(st.integers(0, 29), min_size=1), st.integers(1, 4), st.lists(st.floats(0.9, 1.1), min_size=29, max_size=29)
)
def test_no_step_reuses_what_the_schedule_would_have_replaced(steps, max_skips, ratios):
    cache = MagCache({"cond": ratios}, max_skips=max_skips, retention=0.0)
    schedule, branch, computed_at = cache.schedule["cond"], cache.branch("cond"), []
    for step in sorted(steps):
        blocks = Blocks()
        out = branch(lambda x, step=step, blocks=blocks: blocks(x) + step, torch.zeros(1, 2, 3), step=step)
        if blocks.calls:
            computed_at.append(step)
        last_scheduled = max(index for index in range(step + 1) if schedule[index])
        assert last_scheduled <= computed_at[-1] <= step
        assert float(out[0, 0, 0]) == 1 + computed_at[-1]
        assert not schedule[step] or blocks.calls


def test_a_step_before_the_last_one_begins_a_new_run_of_the_branch():
    branch = MagCache({"cond": [1.0] * 9}, retention=0.0).branch("cond")
    run_steps(branch, Blocks(scale=7.0), [3, 4])
    assert run_steps(branch, Blocks(), [1, 2]) == ([1, 1], 1)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_that_the_run_has_not_is_refused(step):
    with pytest.raises(ValueError, match=f"step: expected 0 to 9, as the run has steps, got {step}"):
        MagCache({"cond": [1.0] * 9}).branch("cond")(Blocks(), torch.zeros(1, 2, 3), step=step)


def test_calibration_takes_every_step_and_refuses_a_gap():
    branch = MagCalibration().branch("cond")
    for step in range(3):
        branch(Blocks(), torch.zeros(1, 2, 3), step=step)
    with pytest.raises(ValueError, match="step: expected 3, the next one, got 5"):
        branch(Blocks(), torch.zeros(1, 2, 3), step=5)


def test_residuals_are_detached_and_not_kept_when_no_step_reuses_them():
    cache = MagCache({"cond": [1.0] * 4}, retention=0.0, max_skips=1)
    branch, weight = cache.branch("cond"), torch.ones(1, 2, 3, requires_grad=True)
    kept = []
    for _ in range(5):
        branch(lambda x: x * 2 + weight, torch.zeros(1, 2, 3))
        kept.append([tensor.requires_grad for _, (tensor,) in cache._kept["cond"]])
    assert cache.schedule["cond"] == [True, False, True, False, True]
    assert kept == [[False], [], [False], [], []]


def test_an_exception_in_the_blocks_leaves_the_step_to_be_run_again():
    cache = MagCache({"cond": [1.0] * 4}, retention=0.0)

    def out_of_memory(x):
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.branch("cond")(out_of_memory, torch.zeros(1, 2, 3))
    blocks = Blocks()
    run(cache.branch("cond"), blocks, 5)
    assert blocks.calls == cache.schedule["cond"].count(True)


def test_released_list_interleaves_cond_and_uncond():
    flat = [value for step in range(49) for value in (1.0 + step / 1000, 2.0)]
    cache = MagCache.from_released(flat, steps=50)
    assert cache.schedule["cond"] == compute_schedule(flat[0::2], THRESHOLD, MAX_SKIPS, RETENTION)
    assert cache.schedule["uncond"] == [True] * 50


def test_released_distilled_list_has_no_unconditional_branch():
    cache = MagCache.from_released([1.0, 0.0] * 49, steps=50)
    assert list(cache.schedule) == ["cond"]
    with pytest.raises(ValueError, match="uncond"):
        cache.branch("uncond")


@pytest.mark.parametrize("preset", ["lite_t2v_5s_sft_sd", "lite_i2v_5s_sft_sd", "pro_t2v_10s_sft_hd"])
def test_released_ratios_skip_over_a_third_of_the_passes(preset):
    cache = MagCache.from_released(RELEASED[preset].mag_ratios, steps=50)
    computed = sum(schedule.count(True) for schedule in cache.schedule.values())
    assert 40 <= computed <= 65


def test_calibration_measures_the_ratio_of_residual_norms_by_branch():
    calibration = MagCalibration()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 2.0, 3.0):
        out = calibration.branch("cond")(lambda x, scale=scale: x + scale * torch.sign(x), x)
        assert torch.equal(out, x + scale * torch.sign(x))
        calibration.branch("uncond")(lambda x: x + 1, x)
    assert calibration.ratios["cond"] == pytest.approx([2.0, 1.5], rel=1e-5)
    assert calibration.ratios["uncond"] == pytest.approx([1.0, 1.0], rel=1e-5)


def test_calibrated_ratios_make_a_cache_and_reset_forgets_them():
    calibration = MagCalibration()
    run(calibration.branch("cond"), Blocks(), 10)
    assert MagCache(calibration.ratios).steps == 10
    calibration.reset(10)
    assert calibration.ratios == {}


def test_blocks_that_change_nothing_still_give_finite_ratios():
    calibration = MagCalibration()
    run(calibration.branch("cond"), lambda x: x, 3)
    assert calibration.ratios["cond"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MagCache({}), "at least one branch"),
        (lambda: MagCache({"cond": [1.0], "uncond": [1.0, 1.0]}), "as many"),
        (lambda: MagCache({"cond": [math.nan]}), "finite"),
        (lambda: MagCache({"cond": [1.0]}, retention=20), "retention"),
        (lambda: MagCache.from_released([1.0] * 97, steps=50), "even number"),
        (lambda: MagCache.from_released([1.0] * 98, steps=0), "steps"),
    ],
)
def test_wrong_input_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_last_step_always_runs():
    assert compute_schedule([1.0] * 49, 1.0, 100, 0.0) == [True] + [False] * 48 + [True]


def extrapolated(ratios, extrapolate, residual_of, steps=10):
    """The residual that every step adds to zeros, and the steps that ran."""
    branch = MagCache({"cond": ratios}, retention=0.2, extrapolate=extrapolate).branch("cond")
    ran = []

    def blocks(x, step):
        ran.append(step)
        return x + residual_of(step)

    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    outputs = [branch(lambda x, step=step: blocks(x, step), x, step=step) for step in range(steps)]
    return [float(out[0, 0, 0]) for out in outputs], ran


def test_a_residual_that_changes_evenly_is_extrapolated_exactly_no_further_than_it_leads_back():
    outputs, ran = extrapolated([1.0] * 9, 1.0, lambda step: 3.0 + 2.0 * step)
    assert ran == [0, 1, 4, 7, 9]
    expected = [3.0 + 2.0 * step for step in range(10)]
    expected[3] = expected[2]  # two steps from step 1, which is one from step 0
    assert outputs == pytest.approx(expected)


def test_half_of_the_extrapolation_is_half_way():
    outputs, _ = extrapolated([1.0] * 9, 0.5, lambda step: 2.0 * step)
    assert outputs[2:4] == pytest.approx([2.0 + 1.0, 2.0 + 1.0])
    assert outputs[5:7] == pytest.approx([8.0 + 1.0, 8.0 + 2.0])


@given(st.lists(st.floats(0.9, 1.1), min_size=1, max_size=30), st.integers(0, 4), st.sampled_from([0.0, 0.2, 0.5]))
def test_what_is_kept_is_what_a_coming_step_uses(ratios, max_skips, retention):
    cache = MagCache({"cond": ratios}, max_skips=max_skips, retention=retention, extrapolate=1.0)
    schedule, recorded = cache.schedule["cond"], []
    for step, computed in enumerate(schedule):
        assert cache.decide("cond", step) == computed
        assert len(cache._kept["cond"]) <= (1 if computed else 2)
        if computed:
            cache.record("cond", step, (torch.tensor([float(step)]),))
            recorded.append(step)
        else:
            assert [kept.step for kept in cache._kept["cond"]] == recorded[-2:]
            (residual,) = cache.reuse("cond", step)
            assert float(residual) == pytest.approx(step if len(recorded) > 1 else recorded[-1], rel=1e-5)
    assert cache._kept["cond"] == []


def test_together_all_branches_run_on_the_steps_that_the_mean_of_their_ratios_gives():
    ratios = {"cond": [1.0, 0.9, 1.1, 0.8, 1.0, 0.9, 1.0], "uncond": [1.0, 1.0, 0.9, 1.1, 0.9, 1.0, 0.7]}
    mean = [(a + b) / 2 for a, b in zip(*ratios.values(), strict=True)]
    apart = MagCache(ratios, threshold=0.12, retention=0.0)
    cache = MagCache(ratios, threshold=0.12, retention=0.0, together=True)
    assert apart.schedule["cond"] != apart.schedule["uncond"]
    assert cache.schedule == dict.fromkeys(ratios, compute_schedule(mean, 0.12, 2, 0.0))
    for name, values in ratios.items():
        assert cache.errors[name] == reuse_errors(values, cache.schedule[name])


def test_together_a_target_is_reached_too():
    ratios = {"cond": [0.9 + 0.01 * step for step in range(19)], "uncond": [1.1 - 0.01 * step for step in range(19)]}
    cache = MagCache.for_target(ratios, speedup=2.0, together=True)
    assert cache.schedule["cond"] == cache.schedule["uncond"]
    assert speedup_of(cache.schedule) >= 2


def test_a_target_chooses_the_threshold():
    ratios = {"cond": [1.0 + 0.002 * (step % 5) for step in range(49)], "uncond": [1.01] * 49}
    faster = MagCache.for_target(ratios, speedup=1.8)
    assert faster.threshold < 0.2
    assert speedup_of(faster.schedule) >= 1.8
    less = MagCache(ratios, threshold=math.nextafter(faster.threshold, 0) - 1e-12)
    assert speedup_of(less.schedule) < 1.8
    closer = MagCache.for_target(ratios, error=0.002)
    errors = [error for branch in closer.errors.values() for error in branch]
    assert 0.001 < sum(errors) / len(errors) <= 0.002
    closer.reset(30)
    assert len(closer.schedule["cond"]) == 30


@pytest.mark.parametrize(
    ("target", "message"),
    [({}, "either"), ({"error": 0.1, "speedup": 2}, "either"), ({"speedup": 4.0}, "at most 2.0"), ({"error": -1}, "0")],
)
def test_a_target_that_cannot_be_met_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        MagCache.for_target({"cond": [1.0] * 49}, **target)
