"""Processes that are killed at any moment lose no more than the steps since the last checkpoint, and nobody hangs."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from full_disk import fill_disk_in, needs_full_disk
from sharded_training import CPU, EVERY, Training, poison, wide_loop

from bench.gloo_processes import on_processes
from train.checkpoint import Checkpoints
from train.log import Log
from train.loop import CHECKPOINTS
from train.parallel import processes

STEPS = 10


def final_state(out: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint after the last step, whole, as one process reads them."""
    saved, refused = Checkpoints(out / CHECKPOINTS).newest()
    assert saved is not None
    assert (saved.done, refused) == (steps, [])
    state = {name: torch.empty_like(stored, device="cpu") for name, stored in saved.tensors().items()}
    saved.read_into(state)
    return state


def assert_ends_as_undisturbed(out: Path, undisturbed: Path) -> None:
    """Bit for bit; so does the log, but for the times in it."""
    state, expected = final_state(out), final_state(undisturbed)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    logs = [[(row["step"], row["loss"]) for row in Log(run / "log.jsonl").rows()] for run in (out, undisturbed)]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == list(range(EVERY, STEPS + 1, EVERY))
    assert not list((out / CHECKPOINTS).glob("*.partial"))


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a training of two processes that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert Training.start(out, STEPS).end() == [0, 0]
    return out


def kill_once(out: Path, chosen: random.Random, while_saving: bool, rank: int, told: bool) -> bool:
    """Start or go on, and kill a rank; told: the other one gets SIGTERM, as torchrun sends it. Whether it was in time.

    The other one ends by itself.
    """
    training = Training.start(out, STEPS)
    if while_saving:
        training.wait_for(training.is_saving)
        time.sleep(chosen.uniform(0, 0.02))
    else:
        time.sleep(chosen.uniform(0, 1))
    together = training.all_train()
    training.kill(rank)
    if told:
        training.kill(1 - rank, number=signal.SIGTERM)
    if not together:  # torchrun would, after half a minute
        training.kill(1 - rank)
    codes = training.end()
    allowed = (
        {0, 1, 128 + signal.SIGTERM} if together else {0, 1, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
    )
    assert codes[1 - rank] in allowed, training.words()
    return codes[rank] == -signal.SIGKILL


def test_a_training_of_which_ranks_are_killed_goes_on_by_itself_to_the_same_end(tmp_path, undisturbed):
    chosen = random.Random(0)
    killed = [
        kill_once(tmp_path, chosen, while_saving, rank, told)
        for while_saving, rank, told in ((True, 1, False), (True, 0, True), (False, 1, False))
    ]
    assert sum(killed) >= 2
    assert Training.start(tmp_path, STEPS).end() == [0, 0]
    assert_ends_as_undisturbed(tmp_path, undisturbed)


def test_another_number_of_processes_goes_on_to_the_same_end(tmp_path, undisturbed):
    for world, steps in ((2, 4), (4, 6)):
        assert Training.start(tmp_path, steps, world).end() == [0] * world
    wide_loop(STEPS).run(tmp_path, EVERY)
    assert_close(final_state(tmp_path), final_state(undisturbed))


def test_a_signal_to_one_rank_stops_all_when_they_have_saved(tmp_path, undisturbed):
    training = Training.start(tmp_path, 10_000)
    assert training.wait_for((tmp_path / CHECKPOINTS / "step-000002").exists)
    training.kill(1, number=signal.SIGTERM)
    assert training.end() == [128 + signal.SIGTERM] * 2
    (words,) = training.words()
    saved, _ = Checkpoints(tmp_path / CHECKPOINTS).newest()
    assert words == f"training: stopped by SIGTERM; step {saved.done} is saved"


def unlucky(folder: Path) -> tuple[list, list, list]:
    """On two ranks: a loss that is not finite on one of them, then a disk that is full for one of them."""
    errors = ["", ""]
    with processes(CPU, where=f"file://{folder / 'meeting'}") as parallel:
        loop = wide_loop(6, parallel)
        if parallel.rank == 1:
            poison(loop, step=3)
        loop.run(folder, EVERY)
        rows = [(row["step"], row.get("left_out")) for row in Log(folder / "log.jsonl").rows()]
        with pytest.MonkeyPatch.context() as full:
            fill_disk_in("step-000008.partial", "__1_0.distcp", full)
            try:
                wide_loop(1000, parallel).run(folder, EVERY)
            except OSError as error:
                dist.all_gather_object(errors, str(error))
    return rows, errors, sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


@needs_full_disk
def test_what_befalls_one_rank_befalls_all():
    rows, errors, checkpoints = on_processes(2, unlucky)
    assert rows == [[2, None], [4, 1], [6, None]]
    assert errors[0] == errors[1]
    assert "No space left on device" in errors[0]
    assert errors[0].endswith("step-000008'")
    assert checkpoints == ["step-000004", "step-000006"]


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path, undisturbed):
    chosen, kills, saving = random.Random(0), 0, 0
    number = 0
    while kills < 30:
        out, number = tmp_path / str(number), number + 1
        for _ in range(4):
            while_saving = chosen.random() < 0.6
            killed = kill_once(out, chosen, while_saving, chosen.randrange(2), told=chosen.random() < 0.5)
            kills += killed
            saving += killed and while_saving
        assert Training.start(out, STEPS).end() == [0, 0]
        assert_ends_as_undisturbed(out, undisturbed)
    print(f"{kills} kills, {saving} of them while a checkpoint was written, in {number} trainings")
    assert saving > 5
