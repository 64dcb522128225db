"""The sweep measures the trainer's steps, and `k5 plan calibrate --sweep` fits to them."""

import sys

import pytest
from command_line import fails

from train import sweep as sweep_module
from train.sweep import ROOT, Point, points, sweep


def test_the_sweep_varies_width_tokens_depth_batch_and_attention():
    chosen = points()
    assert len(set(chosen)) == len(chosen) >= 24
    for field in ("model_dim", "tokens", "blocks", "batch", "nabla_thr"):
        assert len({getattr(point, field) for point in chosen}) >= 2


@pytest.mark.slow
def test_a_sweep_runs_the_trainer_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module, "STEPS", 2)
    (dense, nabla) = sweep([Point(64, 1, 1, 1, None), Point(64, 1, 1, 2, 0.3)])
    assert dense.step.tokens == 256
    assert dense.step.density == 1 > nabla.step.density
    assert dense.step.step_ms > 0
    assert dense.peak_bytes > dense.base_bytes


def test_a_trainer_that_fails_says_at_which_point():
    with pytest.raises(ValueError, match=r"(?s)the trainer failed at Point\(model_dim=65, .*multiple of the head dim"):
        sweep([Point(65, 1, 1, 1, None)])


def test_calibrate_without_the_repository_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(ROOT))])
    fails("plan calibrate --sweep", 1, "--sweep: expected the trainer", "root of a clone", "--steps FILE")


def test_another_package_of_that_name_is_not_the_trainer(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(ROOT))])
    fails("plan calibrate --sweep", 1, "--sweep: expected the trainer")
