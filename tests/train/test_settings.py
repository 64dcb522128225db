"""A stage's settings: by name, as a file that is printed, edited and given back, and with every error in one line."""

import json
from dataclasses import asdict, fields, replace

import pytest

from k5kernels.attention import RELEASED_WINDOW
from k5kernels.planner.stages import table_4
from train.settings import Settings, make_settings, read_values
from train.stages import AFTER, stage_values

NAMES = [*table_4(), "nano_t2i", "nano_t2v", "nano_t2v_long"]


def settings_of(name: str) -> Settings:
    return make_settings(*stage_values(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_printed_and_given_back_is_the_same(name, tmp_path):
    stage = settings_of(name)
    assert stage.name == name
    path = tmp_path / "stage.json"
    path.write_text(stage.as_json())
    assert settings_of(str(path)) == stage


def test_a_stage_of_the_report_has_the_reports_figures():
    stage = settings_of("video_lite_mr_10s")
    assert (stage.preset, stage.steps, stage.batch, stage.frames) == ("video_lite", 10_000, 665, 241)
    assert (stage.learning_rate, stage.weight_decay, stage.nabla_thr) == (3e-5, 1e-3, 0.9)
    assert stage.tasks == {"t2i": 0.01, "t2v": 0.79, "i2v": 0.20}
    training = stage.training
    assert training.attention.sta == RELEASED_WINDOW
    assert (training.latent_frames, training.image_share) == (61, 0.01)
    assert training.image_to_video == pytest.approx(0.20 / 0.99)
    assert dict(training.resolutions)[64, 96] == 0.25
    assert (stage.schedule.max_grad_norm, stage.ema_decay, stage.unconditional) == (1.0, 0.9999, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_but_the_first_starts_from_one_of_the_same_model(name):
    stage = settings_of(name)
    if stage.after is not None:
        assert settings_of(stage.after).preset == stage.preset
    else:
        assert "t2i" in stage.tasks
    assert set(AFTER.values()) <= set(table_4())


def test_a_file_of_toml_says_the_same_as_one_of_json(tmp_path):
    (tmp_path / "stage.toml").write_text('steps = 7\nlearning_rate = 1\n[tasks]\nt2i = 1\n[resolutions]\n"64x96" = 2\n')
    stage = settings_of(str(tmp_path / "stage.toml"))
    assert stage == Settings(steps=7, learning_rate=1.0, tasks={"t2i": 1.0}, resolutions={"64x96": 2.0})
    assert stage.training.image_share == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "steps: expected an integer, got none"),
        ({"steps": "ten"}, "steps: expected an integer, got 'ten'"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"steps": 1.5}, "steps: expected an integer, got 1.5"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": 1}, "'lr': no such key; expected some of steps, name"),
        ({"learning_rate": None}, "learning_rate: expected a number, got None"),
        ({"learning_rate": -1}, "learning_rate: expected a positive number, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number, got nan"),
        ({"weight_decay": -1}, "weight_decay: expected at least 0, got -1"),
        ({"bf16": 1}, "bf16: expected true or false, got 1"),
        ({"preset": "huge"}, "preset: expected one of "),
        ({"tasks": {"t2v": 0.5}}, "tasks: expected shares that sum to 1, got 0.5"),
        ({"tasks": {"t2x": 1}}, "tasks: expected one of t2i, t2v, i2v, editing, got 't2x'"),
        ({"tasks": {"t2i": 2, "t2v": -1}}, "tasks.t2i: expected a share in [0, 1], got 2"),
        ({"tasks": {"t2i": "all"}}, "tasks.t2i: expected a number, got 'all'"),
        ({"tasks": 1}, "tasks: expected an object, got 1"),
        ({"frames": 24}, "frames: expected 1 + a multiple of 4, got 24"),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"resolutions": {}}, "resolutions: expected at least one size"),
        ({"resolutions": {"512": 1}}, 'resolutions: expected "height x width" as in "512x768", got \'512\''),
        ({"resolutions": {"512x100": 1}}, "resolutions: expected multiples of 16 pixels, got '512x100'"),
        ({"resolutions": {"512x512": 0}}, "resolutions.512x512: expected a weight above 0, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"image_batch": 0}, "image_batch: expected at least 1, got 0"),
        ({"nabla_thr": 1.5}, "nabla_thr: expected a share in [0, 1], got 1.5"),
        ({"max_grad_norm": 0}, "max_grad_norm: expected a number above 0, or null, got 0"),
        ({"scheduler_scale": 0}, "scheduler_scale: expected a positive number, got 0"),
        ({"ema_decay": 2}, "ema_decay: expected a share in [0, 1], got 2"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_key(values, words):
    with pytest.raises(ValueError, match=r"^stage\.json: ") as caught:
        make_settings({"steps": 1, **values} if values else {}, "stage.json")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("stage.json", b"{", "expected settings of a stage as JSON"),
        ("stage.json", b"[1]", "expected an object of settings"),
        ("stage.json", b'{"steps": NaN}', "NaN is no number"),
        ("stage.json", b"\xff\xfe", "expected settings of a stage as UTF-8"),
        ("stage.toml", b"steps == 1", "expected settings of a stage as TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_values(tmp_path / name)
    assert words in str(caught.value)


def test_an_unknown_stage_names_those_there_are():
    with pytest.raises(ValueError, match=r"stage: expected one of nano_t2i, .*video_pro_hr_10s, got 'lite'; or the"):
        stage_values("lite")


def test_editing_can_be_planned_and_not_trained():
    with pytest.raises(ValueError, match=r"tasks\.editing: expected 0, got 0\.8: .* no source image"):
        settings_of("image_editing_mr").check_trainable()
    settings_of("video_lite_mr_5s").check_trainable()


def test_every_key_is_printed():
    assert list(json.loads(Settings(1).as_json())) == [field.name for field in fields(Settings)]
    changed = replace(Settings(1), batch=3)
    assert make_settings(json.loads(changed.as_json())) == changed
    assert asdict(changed)["batch"] == 3
