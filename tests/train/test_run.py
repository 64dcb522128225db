"""`python -m train.run` trains, goes on after a kill, writes weights that load, and says beforehand what it takes."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from full_disk import FULL_DISK, needs_full_disk
from latent_samples import sample
from matplotlib.pyplot import imread
from tiny_stage import tiny_stage
from typer.testing import CliRunner

from k5kernels.latents.shards import ShardWriter
from k5kernels.offload.disk import DiskStore
from k5kernels.planner import H100, save_profile
from model.nano import CROSSDIT_WEIGHTS, VAE_WEIGHTS
from model.weights import load_crossdit
from train import run
from train.only_training import only_training
from train.run import main
from train.stored_model import open_model

app = typer.Typer()
app.command()(main)


@pytest.fixture
def latents(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    with ShardWriter(folder / "00000.tar") as shard:
        shard.write(sample("a.mp4", (1, 4, 4)))
    return folder


BLOCKS = 2
SMALL = ("--model-dim", "64", "--blocks", str(BLOCKS))  # what an option that is given twice says last counts


def invoke(latents, out, steps: int, *more: str):
    sizes = () if "--init" in more else SMALL
    command = ["--latents", str(latents), "--out", str(out), "--steps", str(steps), "--every", "2", *sizes, *more]
    if "--captions" not in more:
        command.append("--no-captions")
    return CliRunner().invoke(app, command)


def test_trains_logs_and_writes_weights(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2, "--profile", "1")
    assert result.exit_code == 0, result.output
    (row,) = (json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert row["step"] == 2
    assert min(row["loss"], row["data_ms"], row["tokens_per_s"], row["mfu"]) > 0
    assert row["data_ms"] < row["step_ms"]
    assert f"step 2 of 2: loss {row['loss']:.4f}, " in result.stdout
    load_crossdit(tmp_path / "run" / "crossdit.safetensors")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    # Of the second step alone: each block is computed again in the backward.
    assert sum(event["name"] == "visual block" and event["ph"] == "X" for event in events) == BLOCKS


def test_with_the_vae_it_draws_samples_below_the_losses(latents, tmp_path, monkeypatch):
    monkeypatch.setattr("train.samples.STEPS", 2)
    result = invoke(latents, tmp_path / "run", 4, "--vae", str(VAE_WEIGHTS), "--samples", "2")
    assert result.exit_code == 0, result.output
    drawn = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert drawn == ["step-000002.png", "step-000004.png"]
    assert f"step 4: {tmp_path}/run/samples/step-000004.png" in result.stdout
    assert imread(tmp_path / "run" / "loss.png").shape[0] > 600  # 420 without
    assert invoke(latents, tmp_path / "other", 4, "--samples", "2").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_goes_on_from_its_checkpoint(latents, tmp_path):
    assert invoke(latents, tmp_path / "two", 2).exit_code == 0
    assert invoke(latents, tmp_path / "two", 4).exit_code == 0
    assert invoke(latents, tmp_path / "one", 4).exit_code == 0
    states = [load_crossdit(tmp_path / name / "crossdit.safetensors").state_dict() for name in ("two", "one")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_an_unknown_preset_names_those_there_are(latents, tmp_path):
    assert_one_line(invoke(latents, tmp_path / "run", 2, "--preset", "huge"), "preset: expected one of", "nano")


def test_a_preset_whose_text_width_does_not_fit_is_refused_before_it_is_built(latents, tmp_path):
    assert_one_line(invoke(latents, tmp_path / "run", 2, "--preset", "video_lite"), "preset: expected nano", "3584")


def test_a_width_and_a_depth_replace_the_presets(latents, tmp_path):
    result = invoke(latents, tmp_path / "run", 2, "--model-dim", "128", "--blocks", "3")
    assert result.exit_code == 0, result.output
    config = load_crossdit(tmp_path / "run" / "crossdit.safetensors").config
    assert (config.model_dim, config.ff_dim, config.visual_blocks) == (128, 512, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model-dim", "100"), "multiple of the head dim"),
        (("--init", str(CROSSDIT_WEIGHTS), "--blocks", "2"), "have their own sizes"),
        (("--init", "x"), "x: no such file"),
    ],
)
def test_sizes_that_cannot_be_are_refused(latents, tmp_path, options, words):
    assert_one_line(invoke(latents, tmp_path / "run", 2, *options), words)


def test_every_row_of_the_log_has_what_was_predicted_beside_what_was_measured(latents, tmp_path):
    save_profile(replace(H100, name="here"), tmp_path / "here.json")
    assert invoke(latents, tmp_path / "run", 4, "--hardware", str(tmp_path / "here.json")).exit_code == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["hardware"] == "here"
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
    result = invoke(latents, tmp_path / "run", 2, *large, "--hardware", str(tmp_path / "small.json"))
    assert result.exit_code == 1
    (refusal,) = (line for line in result.stderr.splitlines() if line.startswith("train.run:"))
    assert "expected at most 24.00 GiB of small" in refusal
    assert "GPUs = " in refusal
    assert not (tmp_path / "run").exists()


def assert_one_line(result, *words: str) -> None:
    """Exit code 1, and on stderr the words in one line."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("train.run: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def broken(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--latents", "nowhere"), "nowhere: expected latent shards"),
        (("--captions", "nowhere.json"), "nowhere.json"),
        (("--hardware", "nowhere.json"), "nowhere.json"),
        (("--init", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--vae", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--learning-rate", "0"), "learning_rate: expected a positive number"),
        (("--learning-rate", "nan"), "learning_rate: expected a positive number"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_what_cannot_be_is_one_line(latents, tmp_path, options, words):
    assert_one_line(invoke(latents, tmp_path / "run", 2, *options), words)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": 1}', b"\xff\xfe"])
def test_captions_that_are_none_are_one_line(latents, tmp_path, content):
    captions = broken(tmp_path / "captions.json", content)
    assert_one_line(invoke(latents, tmp_path / "run", 2, "--captions", captions), "captions.json: ")


def train_with(latents, out, *options):
    command = ["--latents", str(latents), "--out", str(out), "--steps", "1", *options]
    return CliRunner().invoke(app, command)


def test_training_begins_with_how_many_clips_have_a_caption(tmp_path):
    latents = tmp_path / "latents"
    latents.mkdir()
    with ShardWriter(latents / "00000.tar") as shard:
        for source in ("one/clip.mp4", "two/clip.mp4", "other.mp4"):
            shard.write(sample(source, (1, 4, 4), first_frame=len(source)))
    captions = tmp_path / "captions.json"
    captions.write_text('{"two/clip": "a cat", "other.mp4": "a dog"}')
    result = train_with(latents, tmp_path / "run", "--captions", str(captions))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 of 3 clips have a caption\n")
    captions.write_text('{"clip": "a cat"}')
    assert_one_line(
        train_with(latents, tmp_path / "run", "--captions", str(captions)), "`one/clip.mp4` and `two/clip.mp4`"
    )


def test_no_caption_at_all_stops_unless_that_is_meant(latents, tmp_path):
    assert_one_line(train_with(latents, tmp_path / "run"), "0 of 1 clips have a caption", "--no-captions")
    result = train_with(latents, tmp_path / "run", "--no-captions")
    assert result.exit_code == 0, result.output
    assert "0 of 1 clips have a caption" in result.stdout
    assert train_with(latents, tmp_path / "run", "--captions", "x.json", "--no-captions").exit_code == 2


@pytest.mark.parametrize("cut", [0, 100, 1300])
def test_a_shard_that_is_not_whole_is_one_line(latents, tmp_path, cut):
    shard = latents / "00000.tar"
    broken(latents / "00001.tar", shard.read_bytes()[:cut])
    assert_one_line(invoke(latents, tmp_path / "run", 2), "00001.tar")


def test_an_empty_folder_of_latents_is_one_line(tmp_path):
    (tmp_path / "latents").mkdir()
    assert_one_line(invoke(tmp_path / "latents", tmp_path / "run", 2), "latents: expected latent shards (*.tar), found")


def test_latents_of_sides_that_the_model_cannot_take_are_one_line(latents, tmp_path):
    with ShardWriter(latents / "00001.tar") as shard:
        shard.write(sample("b.mp4", (1, 5, 4)))
    assert_one_line(invoke(latents, tmp_path / "run", 2), "multiples of the patch (1, 2, 2), got (1, 5, 4)")


def test_a_latent_that_is_not_finite_names_shard_and_key(latents, tmp_path, monkeypatch):
    poisoned = sample("b.mp4", (1, 4, 4))
    poisoned.latent[0, 0, 0, 0] = torch.nan
    monkeypatch.setattr("k5kernels.latents.shards._check", lambda *arguments: None)
    with ShardWriter(latents / "00001.tar") as shard:
        shard.write(poisoned)
    assert_one_line(invoke(latents, tmp_path / "run", 2), "00001.tar: b-0 of b.mp4", "finite")
    monkeypatch.undo()
    assert_one_line(invoke(latents, tmp_path / "run", 2), "00001.tar: b-0", "finite")


def test_out_that_is_a_file_is_one_line(latents, tmp_path):
    assert_one_line(invoke(latents, broken(tmp_path / "run", b""), 2), "run")


@pytest.fixture
def trained(latents, tmp_path):
    """A folder with a run of two steps."""
    assert invoke(latents, tmp_path / "run", 2).exit_code == 0
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_going_on_from_what_does_not_fit_is_refused_before_anything_is_loaded(latents, trained, monkeypatch):
    before = contents(trained)
    monkeypatch.setattr(run, "read_shards", lambda folder: pytest.fail("the data were read"))
    for options, words in (
        (("--seed", "3", "--batch", "2"), "seed 0 (now 3), batch 1 (now 2); give those"),
        (("--learning-rate", "1e9"), "learning_rate 0.0001 (now 1000000000.0)"),
        (("--nabla-thr", "0.5"), 'attention.engine "auto" (now "nabla")'),
        (("--model-dim", "128"), "another model's checkpoint: model.model_dim 64 (now 128)"),
        (("--blocks", "3", "--set-on-resume"), "another model's checkpoint: model.visual_blocks 2 (now 3)"),
        (("--init", str(trained / "crossdit.safetensors")), "another model's checkpoint: init null (now \"sha256 "),
    ):
        assert_one_line(invoke(latents, trained, 4, *options), "checkpoints/step-000002: ", words)
    checkpoints = trained / "checkpoints"
    description = checkpoints / "step-000002" / "checkpoint.json"
    for content in (b"", description.read_bytes()[:50]):
        broken(description, content)
        assert_one_line(invoke(latents, trained, 4), "checkpoints/step-000002: ", "damaged or foreign")
    checkpoints.rename(trained / "away")
    checkpoints.touch()
    assert_one_line(invoke(latents, trained, 4), "checkpoints: expected a folder of checkpoints, found a file")
    checkpoints.unlink()
    (trained / "away").rename(checkpoints)
    broken(description, before["checkpoints/step-000002/checkpoint.json"])
    assert contents(trained) == before


def test_a_learning_rate_that_ruins_the_model_stops_with_the_last_good_checkpoint(latents, trained):
    before = contents(trained)
    result = invoke(latents, trained, 40, "--learning-rate", "1e30", "--set-on-resume")
    assert_one_line(result, "step ", "expected a finite", "a-0 of a.mp4", "the checkpoint of step 2 stays")
    after = contents(trained)
    assert {name: after[name] for name in before if name != "log.jsonl"} == {
        name: before[name] for name in before if name != "log.jsonl"
    }
    for line in (trained / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert invoke(latents, trained, 4).exit_code == 0


def signal_at(step: int, number: int, monkeypatch) -> None:
    """The process sends itself the signal in a step, counted from 0."""
    loss = run.CrossDiTStage.loss

    def signalled(stage, now, generator):
        if now == step:
            os.kill(os.getpid(), number)
        return loss(stage, now, generator)

    monkeypatch.setattr(run.CrossDiTStage, "loss", signalled)


@pytest.mark.parametrize(("name", "saved"), [("SIGTERM", 3), ("SIGINT", 2)])
def test_a_signal_ends_the_run_in_one_line_when_its_steps_are_saved(latents, trained, monkeypatch, name, saved):
    number = signal.Signals[name]
    signal_at(saved, number, monkeypatch)
    result = invoke(latents, trained, 9)
    assert result.exit_code == 128 + number
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("train.run:"))
    assert f"stopped by {name}; {trained}/checkpoints holds step {saved} of 9" in line
    assert signal.getsignal(number) is not None


def test_who_does_not_wait_for_the_end_of_the_step_sends_the_signal_again(latents, trained, monkeypatch):
    monkeypatch.setattr("train.stopping.SAME_REQUEST_SECONDS", 0.1)

    def never_ends(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    monkeypatch.setattr(run.CrossDiTStage, "loss", never_ends)
    result = invoke(latents, trained, 4)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "holds step 2 of 4" in result.stderr


def test_a_second_run_into_the_folder_is_refused_and_changes_nothing(latents, trained):
    before = contents(trained)
    with only_training(trained):
        assert_one_line(invoke(latents, trained, 4), f"{trained}: is being written by process {os.getpid()} on", "wait")
        assert invoke(latents, trained, 4, "--dry-run").exit_code == 0
    assert contents(trained) == before


def test_weights_that_float16_cannot_hold_are_not_written(tmp_path):
    stage = tiny_stage()
    next(iter(stage.average.tensors.values())).fill_(1e6)
    with pytest.raises(ValueError, match=r"crossdit\.safetensors: expected weights that float16 can hold"):
        run.save_averaged(stage, tmp_path)
    assert list(tmp_path.iterdir()) == []


def command(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_printed_stage_is_edited_and_given_back(latents, tmp_path):
    result = command("--stage", "nano_t2i", "--print-stage", "--steps", 1, "--warmup-steps", 0, "--no-bf16")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["name"], values["steps"], values["batch"]) == ("nano_t2i", 1, 8)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values | {"name": "mine", "batch": 3}))
    again = json.loads(command("--stage", path, "--print-stage", "--batch", 2).stdout)
    assert again == values | {"name": "mine", "batch": 2}
    train = ("--latents", latents, "--out", tmp_path / "run", "--no-captions", "--stage", path, "--batch", 2)
    assert command(*train).exit_code == 0
    assert_one_line(command(*train, "--batch", 3), "batch 2 (now 3)")


def test_an_error_in_a_stages_file_is_one_line_before_anything_is_loaded(latents, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "read_shards", lambda folder: pytest.fail("the data were read"))
    path = tmp_path / "mine.json"
    path.write_text('{"steps": 2, "learning_rate": "fast"}')
    train = ("--latents", latents, "--out", tmp_path / "run", "--no-captions")
    assert_one_line(command(*train, "--stage", path), "mine.json: learning_rate: expected a number, got 'fast'")
    assert_one_line(command(*train, "--stage", "lite"), "stage: expected one of nano_t2i")
    assert_one_line(command(*train), "steps: expected an integer, got none")
    assert_one_line(command(*train, "--stage", "image_editing_mr"), "tasks.editing: expected 0, got 0.8")
    assert_one_line(command("--stage", "nano_t2i"), "expected --latents")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_released_stage_prints_the_layout_that_would_run():
    result = command("--stage", "video_lite_mr_5s", "--dry-run", "--gpus", 64)
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines()
    assert first.startswith("video_lite_mr_5s on H100: ")
    assert "GPUs = " in first
    assert "a step takes " in second
    assert "GPU-hours" in second
    assert "of 80.00 GiB a GPU: states " in third
    assert_one_line(command("--stage", "video_pro_hr_10s", "--dry-run", "--gpus", 1), "no layout is possible")
    assert_one_line(command("--stage", "nano_t2i", "--dry-run"), "resolutions: expected those to plan for", "--latents")


def next_stage(latents, tmp_path, *options: object):
    """One step of a stage that changes next to nothing, and the weights that it leaves."""
    fixed = ("--stage", "nano_t2i", "--steps", 1, "--no-bf16", "--batch", 1, "--learning-rate", 1e-12)
    out = tmp_path / "next"
    result = command("--latents", latents, "--out", out, "--no-captions", *fixed, "--warmup-steps", 0, *options)
    return result, load_crossdit(out / "crossdit.safetensors").state_dict() if result.exit_code == 0 else {}


@pytest.mark.slow
def test_a_stage_starts_from_the_weights_of_another_ones_run(latents, trained, tmp_path):
    _, after = next_stage(latents, tmp_path, "--init", trained)
    for name, weight in load_crossdit(trained / "crossdit.safetensors").state_dict().items():
        torch.testing.assert_close(after[name], weight, atol=1e-3, rtol=1e-3)
    result, _ = next_stage(latents, tmp_path, "--init", tmp_path)
    assert_one_line(result, str(tmp_path))


@pytest.mark.slow
def test_a_stage_starts_from_the_averages_of_a_run_that_was_stopped(latents, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as signalled:
        signal_at(2, signal.SIGTERM, signalled)
        options = ("--learning-rate", "1e-2", "--warmup-steps", "0")
        assert invoke(latents, stopped, 9, *options).exit_code == 128 + signal.SIGTERM
    assert not (stopped / "crossdit.safetensors").exists()
    averages = dict(open_model(stopped).read())
    weights = dict(open_model(stopped, raw=True).read())
    _, after = next_stage(latents, tmp_path, "--init", stopped)
    assert max((weights[name] - averages[name]).abs().max() for name in weights) > 1e-3
    for name, tensor in averages.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_run_with_offload_ends_with_the_same_weights_and_leaves_nothing_in_its_folder(latents, tmp_path, monkeypatch):
    away = []
    put = DiskStore.put
    monkeypatch.setattr("train.building.SMALLEST_OFFLOADED", 1)
    monkeypatch.setattr(DiskStore, "put", lambda store, tensor: away.append(tensor.shape) or put(store, tensor))
    assert invoke(latents, tmp_path / "kept", 2).exit_code == 0
    assert not away
    result = invoke(latents, tmp_path / "away", 2, "--offload", "--offload-folder", str(tmp_path / "scratch"))
    assert result.exit_code == 0, result.output
    assert len(away) == 3 * BLOCKS  # blocks of two steps and of the last one, which shows that the weights are good
    assert list((tmp_path / "scratch").iterdir()) == []
    kept, offloaded = ((tmp_path / name / "crossdit.safetensors").read_bytes() for name in ("kept", "away"))
    assert kept == offloaded


@needs_full_disk
def test_a_disk_that_is_full_of_offloaded_inputs_is_one_line(latents, tmp_path, monkeypatch):
    monkeypatch.setattr("train.building.SMALLEST_OFFLOADED", 1)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir, buffering: FULL_DISK.open("r+b", buffering))
    result = invoke(latents, tmp_path / "run", 2, "--offload")
    assert_one_line(result, "cannot keep activations for the backward: No space left on device", "offloaded")
    assert list((tmp_path / "run" / "offloaded").iterdir()) == []


def test_every_option_is_explained():
    command = typer.main.get_command(app)
    assert [option.name for option in command.params if not getattr(option, "help", None)] == []
