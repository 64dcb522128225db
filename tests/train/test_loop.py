"""The loop resumes bit for bit, runs any stage, and never loses its last good checkpoint."""

import json
import math

import pytest
import torch
from tiny_stage import parameters, tiny_loop, tiny_stage
from torch import nn

from train import checkpoint
from train.checkpoint import CheckpointError, load_checkpoint
from train.log import Log
from train.loop import Loop, NonFiniteError
from train.schedule import Schedule
from train.stage import Loss, Stage


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first = tiny_loop(), tiny_loop()
    losses = [whole.step() for _ in range(6)]
    resumed_losses = [first.step() for _ in range(3)]
    first.save(tmp_path / "checkpoint.pt")
    second = tiny_loop()
    assert second.resume(tmp_path / "checkpoint.pt")
    resumed_losses += [second.step() for _ in range(3)]
    assert resumed_losses == losses
    assert torch.equal(parameters(second), parameters(whole))
    averages = second.stage.average.tensors
    assert all(torch.equal(averages[name], average) for name, average in whole.stage.average.tensors.items())


def test_nothing_is_resumed_where_nothing_was_saved(tmp_path):
    assert not tiny_loop().resume(tmp_path / "checkpoint.pt")


def test_a_save_that_fails_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    loop, path = tiny_loop(), tmp_path / "checkpoint.pt"
    loop.save(path)
    before = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        loop.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


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


def finite(out) -> bool:
    """Whether all tensors of the folder's checkpoint are finite, and all its log is JSON."""
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    stage = load_checkpoint(out / "checkpoint.pt").stage
    moments = [value for state in stage["optimizers"]["adamw"].values() for value in state.values()]
    return all(tensor.isfinite().all() for tensor in [*stage["model"].values(), *stage["average"].values(), *moments])


def test_a_run_goes_on_from_its_folder_and_logs_as_an_uninterrupted_one(tmp_path):
    for steps in (4, 9):
        tiny_loop(steps=steps).run(tmp_path / "two", every=2)
    whole = tiny_loop(steps=9)
    whole.run(tmp_path / "one", every=2)
    last = tiny_loop(steps=9)
    assert last.resume(tmp_path / "two" / "checkpoint.pt")
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
    loss_of = loop.stage.loss

    def poisoned(step, generator):
        loss = loss_of(step, generator)
        return Loss(loss.value * math.nan, loss.samples) if step == 5 else loss

    loop.stage.loss = poisoned
    with pytest.raises(NonFiniteError) as stopped:
        loop.run(tmp_path, every=2)
    message = str(stopped.value)
    assert message.startswith("step 6: expected a finite loss, got nan, on a-")
    assert "of a.mp4" in message
    assert "the checkpoint of step 4 stays" in message
    assert loop.done == 5
    assert load_checkpoint(tmp_path / "checkpoint.pt").done == 4
    assert parameters(loop).isfinite().all()
    assert finite(tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    loop = tiny_loop()
    before = parameters(loop)
    next(loop.stage.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1: expected a finite norm of the gradients, got (nan|inf), on a-"):
        loop.step()
    assert torch.equal(parameters(loop), before)


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
    with pytest.raises(NonFiniteError, match=r"step 5: .* the checkpoint of step 3 stays"):
        loop.run(tmp_path, every=1)
    assert load_checkpoint(tmp_path / "checkpoint.pt").done == 3
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
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused_unless_told(tmp_path):
    tiny_loop(steps=2).run(tmp_path, every=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.0001 \(now 0\.1\)"):
        tiny_loop(steps=4, learning_rate=0.1).run(tmp_path, every=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    loop = tiny_loop(steps=4, learning_rate=0.1, weight_decay=0.5)
    loop.run(tmp_path, every=2, set_on_resume=True)
    assert loop.done == 4
    (group,) = loop.stage.optimizers["adamw"].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.5)
    assert load_checkpoint(tmp_path / "checkpoint.pt").settings["learning_rate"] == 0.1


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
    loop.run(tmp_path, every=2)
    torch.save({"format": 1, "done": 2, "settings": loop.settings, "stage": {"model": {}}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="its state does not fit this stage") as refused:
        tiny_loop(steps=4).run(tmp_path, every=2)
    assert "\n" not in str(refused.value)


def other_moment(value):
    def change(stage):
        stage["optimizers"]["adamw"][0].update(value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: stage["average"]["out_layer.out_layer.bias"].fill_(math.nan),
        lambda stage: stage["model"]["out_layer.out_layer.bias"].fill_(math.inf),
        other_moment({"exp_avg": torch.tensor([1.0, 2.0])}),
        other_moment({"exp_avg": None}),
        other_moment({"exp_avg_sq": torch.tensor(math.nan)}),
        other_moment({"step": torch.tensor(-1e30)}),
    ],
)
def test_a_checkpoint_whose_numbers_cannot_be_gone_on_with_is_refused(tmp_path, change):
    loop = tiny_loop()
    loop.step()
    stage = loop.stage.state_dict()
    change(stage)
    save = checkpoint.save_checkpoint
    save(checkpoint.Checkpoint(1, loop.settings, stage), tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: its state does not fit this stage .*expected"):
        tiny_loop().resume(tmp_path / "checkpoint.pt")
