"""A stage of CrossDiT learns, with and without captions and first frames."""

import pytest
import torch
from latent_samples import sample
from tiny_stage import encode_text, tiny_loop, tiny_stage

from k5kernels.attention import AttentionConfig
from train.crossdit_stage import FlowMatching
from train.latents import LatentBatch
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


def batches(steps: int = 60, samples=None, **settings) -> list[LatentBatch]:
    """What a stage draws for its steps."""
    stage = tiny_stage(samples=samples, **settings)
    drawn: list[LatentBatch] = []
    draw = stage.data.draw
    stage.data.draw = lambda *arguments, **options: drawn.append(draw(*arguments, **options)) or drawn[-1]
    for step in range(steps):
        stage.loss(step, torch.Generator().manual_seed(step))
    return drawn


CLIPS_AND_IMAGES = [
    sample("clip.mp4", (3, 4, 4), 0),
    sample("image.png", (1, 4, 4), 1),
    sample("wide.mp4", (2, 4, 8), 2),
]


def test_a_share_of_the_steps_is_on_images_alone():
    drawn = batches(samples=CLIPS_AND_IMAGES, image_share=0.3, image_batch=4, batch=2)
    images = [batch for batch in drawn if batch.latents.shape[1] == 1]
    assert 0.15 < len(images) / len(drawn) < 0.45
    assert {len(batch.captions) for batch in images} == {4}
    assert all("image.png" in name for batch in images for name in batch.samples)
    clips = [batch for batch in drawn if batch.latents.shape[1] > 1]
    assert {len(batch.captions) for batch in clips} == {2}
    assert {batch.latents.shape[1] for batch in clips} == {2, 3}


def test_without_images_the_first_frames_of_clips_are_images():
    drawn = batches(10, samples=CLIPS_AND_IMAGES[:1], image_share=1.0)
    assert {batch.latents.shape[1] for batch in drawn} == {1}


def test_resolutions_are_drawn_as_often_as_the_stage_says():
    shares = (((4, 4), 1.0), ((4, 8), 3.0))
    drawn = batches(80, samples=CLIPS_AND_IMAGES, resolutions=shares)
    wide = [batch for batch in drawn if batch.latents.shape[3] == 8]
    assert 0.6 < len(wide) / len(drawn) < 0.9
    assert {batch.latents.shape[3] for batch in batches(10, CLIPS_AND_IMAGES, resolutions=shares[:1])} == {4}


def test_a_resolution_or_clips_that_the_data_lack_are_named():
    with pytest.raises(ValueError, match=r"resolutions: expected latents of 64x64 pixels, found 32x32, 32x64"):
        tiny_stage(samples=CLIPS_AND_IMAGES, resolutions=(((8, 8), 1.0),))
    with pytest.raises(ValueError, match=r"image_share: expected latents of more than one frame for the other 90%"):
        tiny_stage(samples=CLIPS_AND_IMAGES[1:2], image_share=0.1)
