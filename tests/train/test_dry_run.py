"""What is planned of a stage is the stage: its model, sizes, batch, steps and attention."""

import pytest

from k5kernels.planner.stages import stage, table_4
from train.dry_run import workload_of
from train.settings import Settings, make_settings
from train.stages import stage_values


@pytest.mark.parametrize("name", table_4())
def test_every_stage_of_the_report_is_planned_as_the_planner_has_it(name):
    assert workload_of(make_settings(*stage_values(name))) == stage(name)


def test_sizes_that_are_left_to_the_data_cannot_be_planned_without_them():
    with pytest.raises(ValueError, match=r"resolutions: expected those to plan for, got none: give --latents"):
        workload_of(Settings(steps=1))
    with pytest.raises(ValueError, match=r"frames: expected those of a clip to plan for, got null: give --latents"):
        workload_of(Settings(steps=1, resolutions={"64x64": 1.0}))


def test_images_are_planned_as_images():
    ((clip, _),) = workload_of(Settings(steps=1, resolutions={"64x64": 1.0}, tasks={"t2i": 1.0})).clips
    assert (clip.frames, clip.tokens) == (1, 16)
