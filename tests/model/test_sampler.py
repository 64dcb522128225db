"""The sampler: its time grid, guidance, a given first frame, repeatability and caching."""

from itertools import pairwise

import pytest
import torch
from latent_models import LatentModel
from torch import nn

from k5kernels.cache import MagCache, MagCalibration
from k5kernels.text_condition import TextCondition
from model.sampler import sample, sampling_steps, time_grid

SHAPE = (2, 3, 4, 6, 16)
FIRST_FRAME = torch.randn(2, 1, 4, 6, 16, generator=torch.Generator().manual_seed(9))


def condition(value):
    return TextCondition(torch.full((2, 3, 8), float(value)), None, torch.zeros(2, 4))


TEXT, NEGATIVE = condition(1), condition(-1)


class Velocity(LatentModel):
    """A smooth field that depends on the latent, the time, the text and the mask; keeps the calls."""

    def __init__(self, visual_cond=True):
        super().__init__(visual_cond)
        self.calls = []
        self.inputs = []

    def velocity(self, x, time, text, cache=None):
        self.calls.append((time[0].item(), text.tokens[0, 0, 0].item()))
        self.inputs.append(x)
        mean = text.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        hidden = x[..., :16]

        def blocks(hidden):
            return hidden + torch.tanh(hidden) + mean * (1 + time.view(-1, 1, 1, 1, 1) / 1000)

        return blocks(hidden) if cache is None else cache(blocks, hidden)


@pytest.mark.parametrize("scale", [None, 1, 5, 10])
@pytest.mark.parametrize("steps", [1, 16, 50])
def test_grid_runs_from_one_to_zero_as_the_shift_says(steps, scale):
    grid = time_grid(steps, scale)
    assert grid.shape == (steps + 1,)
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid.diff() < 0).all()
    for step, time in enumerate(grid.tolist()):
        t = 1 - step / steps
        assert time == pytest.approx((scale or 1) * t / (1 + ((scale or 1) - 1) * t), abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 5.0, 10.0])
def test_euler_steps_equal_diffusers(scale):
    """Its scheduler, given the same unshifted times; left to itself it would end at 1/1000 and then step to 0."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers' scheduler")
    steps, model = 20, Velocity(visual_cond=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=scale)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    torch.testing.assert_close(time_grid(steps, scale), scheduler.sigmas)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for time in scheduler.timesteps:
        cond, uncond = (model.velocity(x, time.repeat(2), text) for text in (TEXT, NEGATIVE))
        x = scheduler.step(uncond + 5.0 * (cond - uncond), time, x, return_dict=False)[0]
    ours = sample(model, TEXT, NEGATIVE, SHAPE, steps=steps, scheduler_scale=scale, seed=3)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_straight_field_is_followed_exactly_to_its_latent():
    target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))

    class Straight(Velocity):
        def velocity(self, x, time, text, cache=None):
            return (x[..., :16] - target) / (time / 1000).view(-1, 1, 1, 1, 1)

    for scale in (None, 10):
        out = sample(Straight(), TEXT, None, SHAPE, steps=7, guidance=1, scheduler_scale=scale, seed=1)
        torch.testing.assert_close(out, target, rtol=1e-4, atol=1e-4)


def test_guidance_costs_a_second_pass_and_guidance_one_does_not():
    model = Velocity()
    sample(model, TEXT, NEGATIVE, SHAPE, steps=4)
    assert [text for _, text in model.calls] == [1, -1] * 4
    assert [time for time, _ in model.calls] == [1000, 1000, 750, 750, 500, 500, 250, 250]
    model = Velocity()
    sample(model, TEXT, None, SHAPE, steps=4, guidance=1)
    assert [text for _, text in model.calls] == [1] * 4


def test_guidance_extrapolates_from_negative_to_text():
    class OfText(Velocity):
        def velocity(self, x, time, text, cache=None):
            return text.tokens.mean() * torch.ones_like(x[..., :16])

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    out = sample(OfText(), condition(2), condition(1), SHAPE, steps=3, guidance=5)
    torch.testing.assert_close(out, noise - (1 + 5 * (2 - 1)))


def test_one_seed_gives_one_latent():
    first, again, other = (sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=3, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == SHAPE
    assert first.dtype == torch.float32


def test_the_first_frame_is_kept_exactly_and_always_shown_clean():
    model = Velocity()
    out = sample(model, TEXT, NEGATIVE, SHAPE, steps=5, first_frame=FIRST_FRAME)
    assert torch.equal(out[:, :1], FIRST_FRAME)
    for x in model.inputs:
        assert torch.equal(x[:, :1, ..., :16], FIRST_FRAME)
        assert (x[:, :1, ..., -1] == 1).all()
        assert (x[:, 1:, ..., -1] == 0).all()
    assert not torch.equal(out[:, 1:], sample(model, TEXT, NEGATIVE, SHAPE, steps=5, seed=1)[:, 1:])


def test_sampling_leaves_the_callers_first_frame_and_the_global_generator_alone():
    first_frame = FIRST_FRAME.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=2, first_frame=first_frame)
    assert torch.equal(first_frame, FIRST_FRAME)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_asked_in_the_dtype_of_the_text_and_the_state_stays_float32():
    model = Velocity()
    texts = [TextCondition(text.tokens.bfloat16(), None, text.pooled.bfloat16()) for text in (TEXT, NEGATIVE)]
    out = sample(model, *texts, SHAPE, steps=2)
    assert all(x.dtype == torch.bfloat16 for x in model.inputs)
    assert out.dtype == torch.float32


def test_progress_is_told_after_every_step():
    told = []
    sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=3, progress=lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def ratios(steps):
    return {branch: [1.01] * (steps - 1) for branch in ("cond", "uncond")}


def test_a_cache_that_never_skips_changes_nothing():
    plain = sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=10)
    cached = sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=10, cache=MagCache(ratios(10), threshold=0.0))
    assert torch.equal(plain, cached)


def test_an_interrupted_run_leaves_nothing_in_the_next_one():
    cache = MagCache(ratios(10))
    clean = sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=10, cache=cache)

    def interrupt(step, steps):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=10, seed=1, cache=cache, progress=interrupt)
    assert torch.equal(sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=10, cache=cache), clean)


def test_a_cache_calibrated_for_other_steps_adapts_and_stays_near_the_plain_sample():
    cache = MagCache(ratios(50))
    plain, cached = (sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=30, cache=c) for c in (None, cache))
    assert len(cache.schedule["cond"]) == 30
    assert not all(cache.schedule["cond"])
    assert 0 < (cached - plain).norm() / plain.norm() < 0.2


def test_calibration_samples_as_without_it_and_yields_ratios_of_both_branches():
    calibration = MagCalibration()
    calibrated = sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=6, cache=calibration)
    assert torch.equal(calibrated, sample(Velocity(), TEXT, NEGATIVE, SHAPE, steps=6))
    assert {branch: len(measured) for branch, measured in calibration.ratios.items()} == {"cond": 5, "uncond": 5}


class Learned(Velocity):
    """The velocity is weight * latent: one Euler step multiplies the latent by 1 + (next_time - time) * weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def velocity(self, x, time, text, cache=None):
        self.calls.append(time[0].item())
        return x[..., :16] * self.weight


def test_no_graph_is_kept():
    assert not sample(Learned(), TEXT, None, SHAPE, steps=2, guidance=1).requires_grad


def test_the_steps_lead_from_the_noise_to_the_sample():
    arguments = {"steps": 5, "scheduler_scale": 3.0, "first_frame": FIRST_FRAME, "seed": 2}
    steps = list(sampling_steps(Velocity(), TEXT, NEGATIVE, SHAPE, **arguments))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    grid = time_grid(5, 3.0).tolist()
    assert [(step.time, step.next_time) for step in steps] == list(pairwise(grid))
    for step, following in pairwise(steps):
        assert torch.equal(step.next_latent, following.latent)
    for step in steps:
        moved = step.latent + (step.next_time - step.time) * step.velocity
        assert torch.equal(step.next_latent[:, 1:], moved[:, 1:])
    with torch.no_grad():
        assert torch.equal(steps[-1].next_latent, sample(Velocity(), TEXT, NEGATIVE, SHAPE, **arguments))


def test_a_step_is_computed_when_it_is_asked_for():
    model = Learned()
    run = sampling_steps(model, TEXT, None, SHAPE, steps=4, guidance=1)
    assert model.calls == []
    next(run)
    assert model.calls == [1000]


def test_the_last_steps_alone_can_be_trained_through():
    """Of n factors 1 + dt * w, the last two have a gradient: d/dw sum(x_n) = sum(x_n) * 2 dt / (1 + dt * w)."""
    model, steps = Learned(), 5
    run = sampling_steps(model, TEXT, None, SHAPE, steps=steps, guidance=1)
    with torch.no_grad():
        for _ in range(steps - 2):
            assert not next(run).next_latent.requires_grad
    last = list(run)[-1]
    last.next_latent.sum().backward()
    dt = -1 / steps
    expected = last.next_latent.detach().sum() * 2 * dt / (1 + dt * 0.5)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_given_first_frame_stops_no_gradient_of_the_other_frames():
    model = Learned()
    for step in sampling_steps(model, TEXT, None, SHAPE, steps=2, guidance=1, first_frame=FIRST_FRAME):
        last = step
    (gradient,) = torch.autograd.grad(last.next_latent[:, :1].sum(), model.weight, retain_graph=True)
    assert gradient == 0
    (gradient,) = torch.autograd.grad(last.next_latent[:, 1:].sum(), model.weight)
    assert gradient != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative": None}, "negative"),
        ({"shape": (1, 3, 4, 6, 16)}, "shape"),
        ({"shape": (2, 3, 4, 6)}, "shape"),
        ({"first_frame": FIRST_FRAME[..., :8]}, "first_frame"),
        ({"steps": 0}, "steps"),
        ({"model": Velocity(visual_cond=False), "first_frame": FIRST_FRAME}, "takes no condition"),
    ],
)
def test_wrong_input_is_refused_in_words(change, message):
    arguments = {"model": Velocity(), "text": TEXT, "negative": NEGATIVE, "shape": SHAPE, **change}
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
    with pytest.raises(ValueError, match=message):
        sampling_steps(**arguments)  # before the first step is asked for
