"""`python -m train.run` trains, goes on after a kill, writes weights that load, and says beforehand what it takes."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from latent_samples import sample
from typer.testing import CliRunner

from k5kernels.latents.shards import ShardWriter
from k5kernels.planner import H100, save_profile
from model.weights import load_crossdit
from train.run import main

app = typer.Typer()
app.command()(main)


@pytest.fixture
def latents(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    with ShardWriter(folder / "00000.tar") as shard:
        shard.write(*sample("a.mp4", (1, 4, 4)))
    return folder


def invoke(latents, out, steps: int, *more: str):
    command = ["--latents", str(latents), "--out", str(out), "--steps", str(steps), "--every", "2", *more]
    return CliRunner().invoke(app, command)


def test_trains_logs_and_writes_weights(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2)
    assert result.exit_code == 0, result.output
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2]
    assert rows[0]["loss"] > 0
    load_crossdit(tmp_path / "run" / "crossdit.safetensors")


def test_goes_on_from_its_checkpoint(latents, tmp_path):
    assert invoke(latents, tmp_path / "two", 2).exit_code == 0
    assert invoke(latents, tmp_path / "two", 4).exit_code == 0
    assert invoke(latents, tmp_path / "one", 4).exit_code == 0
    states = [load_crossdit(tmp_path / name / "crossdit.safetensors").state_dict() for name in ("two", "one")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_more_than_one_process_is_refused(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke(latents, tmp_path / "run", 2)
    assert result.exit_code == 2
    assert "one process" in result.output


def test_an_unknown_preset_names_those_there_are(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2, "--preset", "huge")
    assert result.exit_code == 2
    assert "nano" in result.output


def test_a_preset_whose_text_width_does_not_fit_is_refused_before_it_is_built(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2, "--preset", "video_lite")
    assert result.exit_code == 2
    assert "3584" in result.output


def test_a_width_and_a_depth_replace_the_presets(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2, "--model-dim", "128", "--blocks", "3")
    assert result.exit_code == 0, result.output
    config = load_crossdit(tmp_path / "run" / "crossdit.safetensors").config
    assert (config.model_dim, config.ff_dim, config.visual_blocks) == (128, 512, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--model-dim", "100"), "multiple of the head dim"), (("--init", "x", "--blocks", "2"), "have their own sizes")],
)
def test_sizes_that_cannot_be_are_refused(latents, tmp_path, options, words):
    result = invoke(latents, tmp_path / "run", 2, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_every_row_of_the_log_has_what_was_predicted_beside_what_was_measured(latents, tmp_path):
    save_profile(replace(H100, name="here"), tmp_path / "here.json")
    assert invoke(latents, tmp_path / "run", 4, "--profile", str(tmp_path / "here.json")).exit_code == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["profile"] == "here"
        assert min(row["step_ms"], row["predicted_ms"]) > 0
        assert row["peak_bytes"] > row["base_bytes"]
        assert row["predicted_bytes"] > row["base_bytes"]


def test_a_dry_run_prints_time_and_memory_and_trains_nothing(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "on H100: a step takes" in result.output
    assert "ms" in result.output
    assert "GiB" in result.output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_cannot_fit_and_names_the_nearest_layout_that_does(latents, tmp_path):
    save_profile(replace(H100, name="small", memory_bytes=24 * 2**30), tmp_path / "small.json")
    large = ("--model-dim", "1792", "--blocks", "32", "--dry-run")
    assert invoke(latents, tmp_path / "run", 2, *large).exit_code == 0
    result = invoke(latents, tmp_path / "run", 2, *large, "--profile", str(tmp_path / "small.json"))
    assert result.exit_code == 1
    (refusal,) = (line for line in result.stderr.splitlines() if line.startswith("train.run:"))
    assert "expected at most 24.00 GiB of small" in refusal
    assert "GPUs = " in refusal
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--latents", "nowhere"), "nowhere: expected latent shards"),
        (("--captions", "nowhere.json"), "nowhere.json"),
        (("--profile", "nowhere.json"), "nowhere.json"),
        (("--init", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_a_file_that_is_not_there_is_one_line(latents, tmp_path, options, words):
    result = invoke(latents, tmp_path / "run", 2, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("train.run: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
