"""The loop resumes bit for bit, runs any stage, and never loses its last good checkpoint."""

import json
import math
import os
import signal

import pytest
import torch
from full_disk import fill_disk_in, needs_full_disk
from tiny_stage import parameters, tiny_loop, tiny_stage
from torch import nn

from k5kernels.terminal import Stopped
from train.checkpoint import CheckpointError, Checkpoints, Saved
from train.log import Log
from train.loop import Loop, NonFiniteError
from train.schedule import Schedule
from train.stage import Loss, Stage


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first = tiny_loop(), tiny_loop()
    losses = [whole.step() for _ in range(6)]
    resumed_losses = [first.step() for _ in range(3)]
    first.save(tmp_path / "checkpoints")
    second = tiny_loop()
    assert second.resume(tmp_path / "checkpoints")
    resumed_losses += [second.step() for _ in range(3)]
    assert resumed_losses == losses
    assert torch.equal(parameters(second), parameters(whole))
    averages = second.stage.average.tensors
    assert all(torch.equal(averages[name], average) for name, average in whole.stage.average.tensors.items())


def test_nothing_is_resumed_where_nothing_was_saved(tmp_path):
    assert not tiny_loop().resume(tmp_path / "checkpoints")


def test_the_average_follows_the_weights():
    loop = tiny_loop(ema_decay=0.0)
    loop.step()
    averages = loop.stage.average.tensors
    assert all(torch.equal(averages[name], weight) for name, weight in loop.stage.model.named_parameters())


def test_a_second_loop_over_a_stage_warms_up_to_the_same_learning_rate():
    first = tiny_loop()
    (optimizer,) = first.stage.optimizers.values()
    peak = optimizer.param_groups[0]["lr"]
    first.step()
    assert optimizer.param_groups[0]["lr"] == peak / 2
    second = Loop(first.stage, Schedule(8, warmup_steps=1))
    second.step()
    assert optimizer.param_groups[0]["lr"] == peak


class Duel(Stage):
    """Two networks that learn in turn, each by its own optimizer, as adversarial post-training needs."""

    def __init__(self) -> None:
        model = nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 1)})
        optimizers = {name: torch.optim.AdamW(part.parameters(), lr=1e-2) for name, part in model.items()}
        super().__init__({"stage": "duel"}, model, optimizers, ema_decay=0.9)

    def loss(self, step, generator):
        generated = self.model["generator"](torch.randn(4, 2, generator=generator))
        if step % 2:
            for parameter in self.model["critic"].parameters():
                parameter.requires_grad_(False)
            return Loss(-self.model["critic"](generated).mean(), ["noise"])
        for parameter in self.model["critic"].parameters():
            parameter.requires_grad_(True)
        return Loss(self.model["critic"](generated.detach()).mean(), ["noise"])


def test_two_networks_can_learn_in_turn_without_another_loop():
    loop = Loop(Duel(), Schedule(4, warmup_steps=0))
    moved = []
    for _ in range(4):
        before = {name: part.weight.detach().clone() for name, part in loop.stage.model.items()}
        loop.step()
        moved.append([name for name, part in loop.stage.model.items() if not torch.equal(part.weight, before[name])])
    assert moved == [["critic"], ["generator"]] * 2


def newest(out) -> Saved:
    saved, refused = Checkpoints(out / "checkpoints").newest()
    assert saved is not None
    assert refused == []
    return saved


def finite(out) -> bool:
    """Whether all tensors of the folder's checkpoint are finite, and all its log is JSON."""
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    saved = newest(out)
    tensors = {name: torch.full(stored.shape, math.nan, dtype=stored.dtype) for name, stored in saved.tensors().items()}
    saved.read_into(tensors)
    assert {name.partition(".")[0] for name in tensors} == {"model", "average", "optimizers"}
    return all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_run_goes_on_from_its_folder_and_logs_as_an_uninterrupted_one(tmp_path):
    for steps in (4, 9):
        tiny_loop(steps=steps).run(tmp_path / "two", every=2)
    whole = tiny_loop(steps=9)
    whole.run(tmp_path / "one", every=2)
    last = tiny_loop(steps=9)
    assert last.resume(tmp_path / "two" / "checkpoints")
    assert last.done == 9
    assert torch.equal(parameters(last), parameters(whole))
    rows = [[(row["step"], row["loss"]) for row in Log(tmp_path / run / "log.jsonl").rows()] for run in ("one", "two")]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [2, 4, 6, 8, 9]


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    tiny_loop(steps=4).run(tmp_path, every=2)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 1.0, "step_ms": 1.0}\n{"step": 8, "lo')
    tiny_loop(steps=8).run(tmp_path, every=2)
    assert [row["step"] for row in Log(tmp_path / "log.jsonl").rows()] == [2, 4, 6, 8]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it(tmp_path):
    tiny_loop(steps=4).run(tmp_path, every=2)
    loop = tiny_loop(steps=8)
    poison(loop, 5)
    with pytest.raises(NonFiniteError) as stopped:
        loop.run(tmp_path, every=2, nonfinite_limit=1)
    message = str(stopped.value)
    assert message.startswith("step 6: expected a finite loss, got nan, on a-")
    assert "of a.mp4" in message
    assert "the checkpoint of step 4 stays" in message
    assert loop.done == 5
    assert newest(tmp_path).done == 4
    assert parameters(loop).isfinite().all()
    assert finite(tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    loop = tiny_loop()
    before = parameters(loop)
    next(loop.stage.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1: expected a finite norm of the gradients, got (nan|inf), on a-"):
        loop.step()
    assert torch.equal(parameters(loop), before)


def poison(loop: Loop, *steps: int) -> None:
    """Make the losses of these steps, counted from 0, NaN."""
    loss_of = loop.stage.loss

    def poisoned(step, generator):
        loss = loss_of(step, generator)
        return Loss(loss.value * math.nan, loss.samples) if step in steps else loss

    loop.stage.loss = poisoned


def test_a_step_that_is_not_finite_is_left_out_and_the_log_says_on_which_samples(tmp_path):
    loop = tiny_loop(steps=8)
    poison(loop, 3, 5, 6)
    loop.run(tmp_path, every=2)
    rows = Log(tmp_path / "log.jsonl").rows()
    assert [(row["step"], row.get("left_out")) for row in rows] == [(2, None), (4, 1), (6, 1), (8, 1)]
    assert all(sample.endswith("of a.mp4") for row in rows[1:] for sample in row["left_out_samples"])
    assert finite(tmp_path)
    assert newest(tmp_path).done == 8
    other = tiny_loop(steps=8)
    for step in range(8):
        if step in (3, 5, 6):
            other.done += 1
        else:
            other.step()
    assert torch.equal(parameters(loop), parameters(other))


def test_a_row_whose_steps_were_all_left_out_has_no_loss(tmp_path):
    loop = tiny_loop(steps=4)
    poison(loop, 2, 3)
    loop.run(tmp_path, every=2)
    last = Log(tmp_path / "log.jsonl").rows()[-1]
    assert (last["loss"], last["left_out"]) == (None, 2)


def test_a_checkpoint_that_is_due_at_a_step_that_is_left_out_comes_with_the_next_good_one(tmp_path):
    loop = tiny_loop(steps=5)
    poison(loop, 2)
    loop.run(tmp_path, every=2, keep=9)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000004",
        "step-000005",
    ]


def test_too_many_in_a_row_end_the_training(tmp_path):
    loop = tiny_loop(steps=20)
    poison(loop, 3, 4, 6, 7, 8)
    with pytest.raises(NonFiniteError, match=r"step 9: expected a finite loss, got nan, on a-.* of step 5 stays"):
        loop.run(tmp_path, every=2, nonfinite_limit=3)
    assert newest(tmp_path).done == 5


def test_parameters_that_a_step_has_ruined_are_never_saved(tmp_path):
    """A row and a checkpoint every step: the step that ruins them still has a finite loss of its own."""
    tiny_loop(steps=3).run(tmp_path, every=1)
    loop = tiny_loop(steps=8)
    update = loop.update

    def ruinous():
        update()
        with torch.no_grad():
            for parameter in loop.stage.model.parameters():
                parameter.mul_(1e30)

    loop.update = ruinous
    with pytest.raises(NonFiniteError, match=r"step 7: .* the checkpoint of step 3 stays"):
        loop.run(tmp_path, every=1)
    assert newest(tmp_path).done == 3
    assert finite(tmp_path)
    good = tiny_loop(steps=8)
    good.run(tmp_path, every=1)
    assert [row["step"] for row in Log(tmp_path / "log.jsonl").rows()] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_last_step_is_proved_too(tmp_path):
    loop = tiny_loop(steps=1)
    update = loop.update

    def ruinous():
        update()
        with torch.no_grad():
            next(loop.stage.model.parameters()).fill_(math.nan)

    loop.update = ruinous
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        loop.run(tmp_path, every=1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_other_settings_is_refused_unless_told(tmp_path):
    tiny_loop(steps=2).run(tmp_path, every=2)
    (path,) = (tmp_path / "checkpoints").iterdir()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.0001 \(now 0\.1\)"):
        tiny_loop(steps=4, learning_rate=0.1).run(tmp_path, every=2)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    loop = tiny_loop(steps=4, learning_rate=0.1, weight_decay=0.5)
    loop.run(tmp_path, every=2, set_on_resume=True)
    assert loop.done == 4
    groups = loop.stage.optimizers["adamw"].param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.5), (0.1, 0.0)]
    assert newest(tmp_path).settings["learning_rate"] == 0.1


def test_a_schedule_that_decays_is_of_its_number_of_steps(tmp_path):
    Loop(tiny_stage(), Schedule(2, decay_steps=2)).run(tmp_path, every=2)
    with pytest.raises(CheckpointError, match=r"steps 2 \(now 4\)"):
        Loop(tiny_stage(), Schedule(4, decay_steps=2)).run(tmp_path, every=2)


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    tiny_loop(steps=4).run(tmp_path, every=2)
    with pytest.raises(CheckpointError, match="4 steps are done, expected at most 3"):
        tiny_loop(steps=3).run(tmp_path, every=2)


def test_other_data_are_other_settings(tmp_path):
    tiny_loop(steps=2).run(tmp_path, every=2)
    loop = tiny_loop(steps=4)
    loop.stage.settings["data"] = "other"
    with pytest.raises(CheckpointError, match=r'data "3 samples, sha256 [0-9a-f]{16}" \(now "other"\)'):
        loop.run(tmp_path, every=2)


def test_a_state_that_does_not_fit_is_one_line(tmp_path):
    loop = tiny_loop(steps=2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, loop.settings, {"model.weight": torch.zeros(2)})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match="its state does not fit this stage") as refused:
        loop.run(tmp_path, every=2)
    assert "\n" not in str(refused.value)


MOMENT = "optimizers.adamw.0."
BIAS = "out_layer.out_layer.bias"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"average.{BIAS}", math.nan),
        (f"model.{BIAS}", math.inf),
        (f"model.{BIAS}", torch.tensor([1.0, 2.0])),
        (f"{MOMENT}exp_avg", torch.tensor([1.0, 2.0])),
        (f"{MOMENT}exp_avg_sq", torch.tensor(math.nan)),
        (f"{MOMENT}step", torch.tensor(-1e30)),
        ("optimizers.adamw.9999.step", torch.tensor(1.0)),
        ("optimizers.other.0.step", torch.tensor(1.0)),
        (f"model.{BIAS}", None),
    ],
)
def test_a_checkpoint_whose_numbers_cannot_be_gone_on_with_is_refused(tmp_path, name, value):
    loop = tiny_loop()
    loop.step()
    state = {name: tensor.clone() for name, tensor in loop.stage.state_dict().items()}
    if value is None:
        del state[name]
    elif isinstance(value, float):
        state[name].fill_(value)
    else:
        state[name] = value
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, loop.settings, state)
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"step-000001: its state does not fit this stage .*expected"):
        tiny_loop().resume(tmp_path)


def test_what_a_checkpoint_cannot_keep_is_named():
    loop = tiny_loop()
    loop.step()
    (optimizer,) = loop.stage.optimizers.values()
    next(iter(optimizer.state.values()))["step"] = 3
    with pytest.raises(TypeError, match=r"optimizers\.adamw\.0\.step: expected a tensor, got int"):
        loop.stage.state_dict()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_when_the_steps_that_are_done_are_saved_and_the_next_run_ends_the_same(tmp_path, number):
    loop, whole = tiny_loop(steps=7), tiny_loop(steps=7)
    loss_of = loop.stage.loss

    def signalled(step, generator):
        if step == 3:
            for _ in range(2):  # as where a terminal and torchrun both send it
                os.kill(os.getpid(), number)
        return loss_of(step, generator)

    loop.stage.loss = signalled
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name):
        loop.run(tmp_path / "run", every=100)
    assert signal.getsignal(number) is before
    assert (loop.saved, newest(tmp_path / "run").done) == (3, 3)
    tiny_loop(steps=7).run(tmp_path / "run", every=100)
    whole.run(tmp_path / "whole", every=100)
    last = tiny_loop(steps=7)
    assert last.resume(tmp_path / "run" / "checkpoints")
    assert torch.equal(parameters(last), parameters(whole))


def test_a_signal_at_a_step_that_is_left_out_stops_at_the_next_good_one(tmp_path):
    loop = tiny_loop(steps=7)
    poison(loop, 2)
    loss_of = loop.stage.loss

    def signalled(step, generator):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(step, generator)

    loop.stage.loss = signalled
    with pytest.raises(Stopped):
        loop.run(tmp_path, every=100)
    assert newest(tmp_path).done == 3


@needs_full_disk
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        fill_disk_in("step-000004.partial", "__0_0.distcp", full)
        loop = tiny_loop(steps=100)
        with pytest.raises(OSError, match=r"No space left on device: '.*step-000004'"):
            loop.run(tmp_path, every=2)
    assert loop.done < 100
    assert (loop.saved, newest(tmp_path).done) == (2, 2)
    tiny_loop(steps=5).run(tmp_path, every=2)
    assert newest(tmp_path).done == 5


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    partial = tmp_path / "checkpoints" / "step-000002.partial"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"half")
    tiny_loop(steps=2).run(tmp_path, every=2)
    assert [path.name for path in partial.parent.iterdir()] == ["step-000002"]


def test_a_damaged_checkpoint_is_passed_over_in_a_line_and_set_aside(tmp_path, capsys):
    for steps in (3, 6):
        tiny_loop(steps=steps).run(tmp_path, every=3)
    (tmp_path / "checkpoints" / "step-000006" / "__0_0.distcp").write_bytes(b"")
    capsys.readouterr()
    loop, whole = tiny_loop(steps=6), tiny_loop(steps=6)
    loop.run(tmp_path, every=3)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("train:"))
    assert f"{tmp_path}/checkpoints/step-000006: expected a whole checkpoint" in line
    assert line.endswith("set aside, training goes on from step 3")
    for _ in range(6):
        whole.step()
    assert torch.equal(parameters(loop), parameters(whole))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000006", "step-000006.damaged"]
