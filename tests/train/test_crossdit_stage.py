"""A stage of CrossDiT learns, with and without captions and first frames."""

import pytest
from tiny_stage import encode_text, tiny_loop, tiny_stage

from k5kernels.attention import AttentionConfig
from train.crossdit_stage import FlowMatching
from train.loop import Loop
from train.schedule import Schedule


@pytest.mark.parametrize("attention", [AttentionConfig(), AttentionConfig("nabla", 0.9, (1, 3, 3))])
def test_the_loss_falls(attention):
    loop = tiny_loop(steps=120, learning_rate=3e-3, batch=2, attention=attention)
    losses = [loop.step() for _ in range(120)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_every_caption_is_dropped_when_all_training_is_unconditional():
    seen: list[str] = []
    stage = tiny_stage(unconditional=1.0, batch=3)
    stage.encode_text = lambda captions: seen.extend(captions) or encode_text(captions)
    Loop(stage, Schedule(1)).step()
    assert seen == ["", "", ""]


def test_single_frames_train_without_a_given_frame():
    assert tiny_loop(latent_frames=1, image_to_video=1.0).step() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unconditional", 1.5),
        ("image_to_video", -0.1),
        ("ema_decay", 2.0),
        ("batch", 0),
        ("latent_frames", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", float("inf")),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        FlowMatching(**{field: value})
