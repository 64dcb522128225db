"""Presets of `k5 encode`: the report's buckets and sizes of shards, and options given beside them."""

import pytest

from k5kernels.latents.presets import named_preset, presets
from k5kernels.latents.video import BUCKETS
from k5kernels.planner.stages import stages
from k5kernels.vae import latent_frames

# §6.1.1: latents a tar at low, medium and high resolution.
PICTURES, VIDEOS = {256: 1024, 512: 256, 1024: 64}, {256: 16, 512: 4, 1024: 1}


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_what_the_report_says_of_its_stages(name: str) -> None:
    preset = named_preset(name)
    level = next(side for side in BUCKETS if f"_{side}" in name)
    assert preset.samples_per_shard == (PICTURES if preset.clip_frames == 1 else VIDEOS)[level]
    assert preset.fps == "24"
    assert latent_frames(preset.clip_frames) in (1, 31, 61)
    for stage in preset.stages.removeprefix("images of ").replace("images of ", "").split(", "):
        clips = [clip for clip, _ in stages()[stage][1].clips]
        assert {(clip.height, clip.width) for clip in clips} == set(preset.buckets), stage
        if "images of" not in preset.stages or "t2i" in stage:
            assert {clip.frames for clip in clips} == {preset.clip_frames}, stage


def test_every_stage_of_the_report_has_a_preset() -> None:
    named = " ".join(preset.stages for preset in presets().values())
    assert all(stage in named for stage in stages())


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of image_lite_256, .*, got 'video'"):
        named_preset("video")
