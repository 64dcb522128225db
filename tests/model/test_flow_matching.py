"""Flow matching: the path, the model's input in each regime, and what the loss counts."""

import pytest
import torch
from latent_models import LatentModel

from k5kernels.text_condition import TextCondition
from model.flow_matching import condition_input, flow_matching_loss, noisy_latent, shift_time

B, T, H, W, C = 3, 4, 4, 6, 16


def draw(seed):
    return torch.randn(B, T, H, W, C, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


TEXT = TextCondition(torch.zeros(B, 2, 8), None, torch.zeros(B, 4))
LATENTS = draw(1)


class Velocity(LatentModel):
    """Answers what `answer(x, time)` says and keeps what it was asked."""

    def __init__(self, answer, visual_cond=True):
        super().__init__(visual_cond)
        self.answer = answer

    def velocity(self, x, time, text, cache=None):
        self.x, self.time = x, time
        return self.answer(x, time)


def zero(x, time):
    return torch.zeros_like(x[..., :C])


def true_velocity(x, time):
    """From x_t, t and the clean latent: noise - x_0 = (x_t - x_0) / t."""
    return (x[..., :C].float() - LATENTS) / (time / 1000).view(-1, 1, 1, 1, 1)


def test_path_runs_from_latent_to_noise():
    latent, noise = draw(1), draw(2)
    torch.testing.assert_close(noisy_latent(latent, noise, torch.zeros(B)), latent)
    torch.testing.assert_close(noisy_latent(latent, noise, torch.ones(B)), noise)
    mixed = noisy_latent(latent, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(mixed[1], 0.75 * latent[1] + 0.25 * noise[1])


def test_the_targets_derivative_is_the_paths():
    latent, noise = draw(1).double(), draw(2).double()
    earlier, later = (noisy_latent(latent, noise, torch.full((B,), t, dtype=torch.float64)) for t in (0.3, 0.3001))
    torch.testing.assert_close((later - earlier) / 1e-4, noise - latent, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 1, 5, 10])
def test_shift_keeps_the_ends_and_the_order(scale):
    shifted = shift_time(torch.linspace(0, 1, 11), scale)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert (shifted.diff() > 0).all()


def test_a_shift_of_one_is_none_and_of_ten_lifts_the_middle():
    time = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_time(time, 1), time)
    assert shift_time(torch.tensor(0.5), 10).item() == pytest.approx(10 / 11)


def test_text_to_video_has_an_empty_condition():
    noisy = draw(2)
    channels = condition_input(noisy)
    assert channels.shape == (B, T, H, W, 2 * C + 1)
    assert torch.equal(channels[..., :C], noisy)
    assert (channels[..., C:] == 0).all()


def test_image_to_video_gives_the_first_frame_clean_and_masks_it_alone():
    noisy, first = draw(2), draw(3)[:, :1]
    channels = condition_input(noisy, first)
    assert torch.equal(channels[:, :1, ..., :C], first)
    assert torch.equal(channels[:, 1:, ..., :C], noisy[:, 1:])
    assert (channels[..., C : 2 * C] == 0).all()
    assert (channels[:, :1, ..., -1] == 1).all()
    assert (channels[:, 1:, ..., -1] == 0).all()


def test_a_first_frame_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="first_frame"):
        condition_input(draw(2), draw(3)[:, :2])


@pytest.mark.parametrize("first_frame", [None, torch.tensor([True, False, True])])
def test_the_true_velocity_has_no_loss(first_frame):
    loss = flow_matching_loss(Velocity(true_velocity), LATENTS, TEXT, generator(), first_frame)
    assert loss.item() < 1e-6


def test_the_loss_of_zero_velocity_is_the_targets_power():
    # Noise has power 1, so has the latent, and they are independent.
    assert flow_matching_loss(Velocity(zero), LATENTS, TEXT, generator()).item() == pytest.approx(2, rel=0.1)


def test_a_given_first_frame_does_not_count():
    def wrong_in_the_first_frame(x, time):
        velocity = true_velocity(x, time)
        velocity[:, 0] += 1
        return velocity

    model = Velocity(wrong_in_the_first_frame)
    every = flow_matching_loss(model, LATENTS, TEXT, generator(), torch.tensor([True, True, True]))
    none = flow_matching_loss(model, LATENTS, TEXT, generator(), torch.tensor([False, False, False]))
    one = flow_matching_loss(model, LATENTS, TEXT, generator(), torch.tensor([True, False, True]))
    assert every.item() < 1e-6
    assert none.item() == pytest.approx(1 / T, rel=1e-4)
    assert one.item() == pytest.approx(1 / T / B, rel=1e-4)


def test_only_the_samples_trained_image_to_video_see_their_first_frame():
    model = Velocity(zero)
    flow_matching_loss(model, LATENTS, TEXT, generator(), torch.tensor([True, False, False]))
    assert torch.equal(model.x[0, 0, ..., :C], LATENTS[0, 0])
    assert not torch.isclose(model.x[1:, 0, ..., :C], LATENTS[1:, 0]).all()
    assert model.x[..., -1].sum() == H * W


def test_every_sample_has_its_own_time_in_thousandths():
    model = Velocity(zero)
    flow_matching_loss(model, LATENTS, TEXT, generator())
    assert model.time.shape == (B,)
    assert model.time.unique().numel() == B
    assert model.time.max() > 1
    unshifted = model.time.clone()
    flow_matching_loss(model, LATENTS, TEXT, generator(), scheduler_scale=10)
    torch.testing.assert_close(model.time, shift_time(unshifted / 1000, 10) * 1000)


def test_one_generator_state_gives_one_loss():
    losses = [flow_matching_loss(Velocity(zero), LATENTS, TEXT, generator(seed)) for seed in (4, 4, 5)]
    assert losses[0] == losses[1] != losses[2]


def test_the_input_takes_the_dtype_of_the_text_and_the_loss_is_float32():
    text = TextCondition(TEXT.tokens.bfloat16(), None, TEXT.pooled.bfloat16())
    model = Velocity(zero)
    loss = flow_matching_loss(model, LATENTS.half(), text, generator())
    assert model.x.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


def test_a_model_without_condition_takes_the_noisy_latent_alone():
    model = Velocity(zero, visual_cond=False)
    flow_matching_loss(model, LATENTS, TEXT, generator())
    assert model.x.shape == LATENTS.shape


@pytest.mark.parametrize(
    ("model", "latents", "first_frame", "message"),
    [
        (Velocity(zero), LATENTS, torch.tensor([True]), "one a sample"),
        (Velocity(zero), LATENTS, torch.ones(B), "bool"),
        (Velocity(zero), LATENTS[:, :1], torch.tensor([True] * B), "one frame"),
        (Velocity(zero, visual_cond=False), LATENTS, torch.tensor([True] * B), "takes no condition"),
    ],
)
def test_wrong_input_is_refused_in_words(model, latents, first_frame, message):
    with pytest.raises(ValueError, match=message):
        flow_matching_loss(model, latents, TEXT, generator(), first_frame)


def test_a_shift_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="scheduler_scale"):
        shift_time(torch.tensor(0.5), 0)
