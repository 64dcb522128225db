"""`python -m train.run` trains, goes on after a kill, and writes weights that load."""

import json

import pytest
import torch
import typer
from latent_samples import sample
from typer.testing import CliRunner

from k5kernels.shards import ShardWriter
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
