"""What a stage starts from: weights that a run has left, or the averages in its newest whole checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from sharded_training import wide_loop
from small_crossdit import random_model
from tiny_stage import TINY, tiny_loop

from model.weights import save_crossdit
from train.checkpoint import CheckpointError
from train.run import save_averaged
from train.stored_model import WEIGHTS, open_model


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that has saved steps 2 and 4 and not ended."""
    tiny_loop(4).run(tmp_path / "run", every=2)
    return tmp_path / "run"


def assert_reads(path: Path, expected: dict[str, torch.Tensor], raw: bool = False) -> None:
    stored = open_model(path, raw)
    assert stored.config == TINY
    read = dict(stored.read())
    assert read.keys() == expected.keys() == stored.tensors.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_run_that_has_not_ended_gives_the_averages_of_its_newest_checkpoint(run):
    loop = tiny_loop(4)
    while loop.done < 4:
        loop.step()
    assert_reads(run, loop.stage.average.tensors)
    assert_reads(run, loop.stage.model.state_dict(), raw=True)


def test_a_run_that_has_ended_gives_the_weights_that_it_has_left(run):
    save_crossdit(run / WEIGHTS, random_model(TINY))
    assert_reads(run, random_model(TINY).state_dict())


def test_a_damaged_checkpoint_is_passed_over_in_a_line(run, capsys):
    checkpoints = run / "checkpoints"
    shard = checkpoints / "step-000004" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-9])
    loop = tiny_loop(4)
    loop.step()
    loop.step()
    assert_reads(run, loop.stage.average.tensors)
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000004: expected a whole checkpoint" in line
    assert line.endswith("step 2 is taken")


def test_where_no_checkpoint_is_whole_there_is_nothing_to_start_from(run):
    for path in (run / "checkpoints").iterdir():
        (path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="no older one"):
        open_model(run)
    for path in (run / "checkpoints").iterdir():
        path.rename(path.with_name(path.name + ".partial"))
    with pytest.raises(ValueError, match="run: expected the folder of a run with a checkpoint, found none"):
        open_model(run)


def test_another_stages_checkpoint_is_refused(tmp_path):
    wide_loop(2).run(tmp_path, 2)
    with pytest.raises(
        CheckpointError, match="step-000002: expected the checkpoint of a CrossDiT, found another stage's"
    ):
        open_model(tmp_path)


def test_other_weights_have_another_digest(run):
    first = open_model(run).digest()
    assert first == open_model(run).digest()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert open_model(run).digest() != first
    save_averaged(tiny_loop().stage, run)
    assert open_model(run).digest() not in {first, ""}
