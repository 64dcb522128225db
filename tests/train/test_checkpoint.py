"""A checkpoint is written whole or not at all, and one that is not whole, or another run's, is refused in one line."""

import os
import random
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from full_disk import fill_disk_under, needs_full_disk
from tiny_stage import parameters, tiny_loop

from train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, refuse_others, save_checkpoint
from train.log import Log

CHECKPOINT = Checkpoint(3, {"seed": 0, "model": {"blocks": 2}}, {"weights": torch.arange(5000.0)})


@pytest.fixture
def path(tmp_path):
    save_checkpoint(CHECKPOINT, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: expected")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_checkpoint_comes_back(path):
    loaded = load_checkpoint(path)
    assert (loaded.done, loaded.settings) == (3, CHECKPOINT.settings)
    assert torch.equal(loaded.stage["weights"], CHECKPOINT.stage["weights"])


def test_where_there_is_none_nothing_comes(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoint.pt") is None


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    assert_refused(tmp_path / "checkpoint.pt", "found a folder")


@pytest.mark.parametrize("content", [b"", b"PK", b"no checkpoint\n" * 100, os.urandom(3000)])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert_refused(tmp_path / "checkpoint.pt", "damaged or foreign")


def test_another_programs_checkpoint_is_refused(tmp_path):
    torch.save({"model": {}, "done": 3}, tmp_path / "checkpoint.pt")
    assert_refused(tmp_path / "checkpoint.pt", "another program's or version's")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": 1, "done": 3, "settings": {}, "stage": Code()}, tmp_path / "checkpoint.pt")
    assert_refused(tmp_path / "checkpoint.pt", "damaged or foreign", "its pickle holds other things")
    assert not (tmp_path / "ran").exists()


def test_another_pickle_protocol_is_refused_without_a_warning_beside_the_line(path, recwarn):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"\x80\x02", b"\x80\x06\xff", 1) if name.endswith(".pkl") else data)
    assert_refused(path, "damaged or foreign")
    assert not recwarn.list


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99, 0.9999])
def test_a_truncated_one_is_refused(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert_refused(path, "damaged")


def test_a_flipped_bit_of_a_weight_is_found(path):
    """torch.load alone reads it without a word."""
    whole = bytearray(path.read_bytes())
    at = whole.find(CHECKPOINT.stage["weights"].numpy().tobytes())
    whole[at + 1000] ^= 16
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True)["stage"]["weights"].isfinite().all()
    assert_refused(path, "does not match its checksum")


def test_whatever_bytes_change_is_refused_or_changes_nothing(path):
    whole, chosen = path.read_bytes(), random.Random(0)
    refused = []
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chosen.choice((1, 3, 30))):
            damaged[chosen.randrange(len(damaged))] = chosen.randrange(256)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            assert (loaded.done, loaded.settings) == (3, CHECKPOINT.settings)
            assert torch.equal(loaded.stage["weights"], CHECKPOINT.stage["weights"])
    assert len(refused) > 150
    assert all(message.startswith(f"{path}: expected") and "\n" not in message for message in refused)


def test_other_settings_are_named_each(tmp_path):
    stored = {"seed": 0, "batch": 1, "attention": {"kind": "dense", "thr": 0.9}, "model": {"blocks": 2}}
    given = stored | {"seed": 5, "attention": {"kind": "nabla", "thr": 0.9}, "new": True}
    with pytest.raises(CheckpointError) as refused:
        refuse_others(tmp_path, stored, given, allow_others=False)
    message = str(refused.value)
    assert 'seed 0 (now 5), attention.kind "dense" (now "nabla"), new not set (now true);' in message
    assert "--set-on-resume" in message
    refuse_others(tmp_path, stored, given, allow_others=True)
    refuse_others(tmp_path, stored, stored, allow_others=False)
    refuse_others(tmp_path, stored, {"seed": 0}, allow_others=False)


@pytest.mark.parametrize("change", [{"model": {"blocks": 3}}, {"init": "sha256 0"}, {"stage": "vae"}])
def test_another_model_is_refused_even_so(tmp_path, change):
    stored = {"seed": 0, "model": {"blocks": 2}, "init": None, "stage": "crossdit"}
    with pytest.raises(CheckpointError, match="train into another folder") as refused:
        refuse_others(tmp_path, stored, stored | change | {"seed": 1}, allow_others=True)
    assert "seed" not in str(refused.value)


@needs_full_disk
def test_a_disk_that_is_full_from_the_start_is_an_oserror_that_names_the_file(path, monkeypatch):
    before = path.read_bytes()
    fill_disk_under(path.name, monkeypatch)
    with pytest.raises(OSError, match="No space left on device") as full:
        save_checkpoint(CHECKPOINT, path)
    assert str(path) in str(full.value)
    assert path.read_bytes() == before


def test_a_disk_that_fills_half_way_keeps_the_former_checkpoint(path):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            save_checkpoint(CHECKPOINT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(path) in str(full.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


# Trains the tiny stage, and kills itself at the n-th call of a function of `os` or of a file, or at a random moment.
TRAINING = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, "tests")
from full_disk import fill_disk_under, needs_full_disk
from tiny_stage import tiny_loop
import train.checkpoint as checkpoint
out, moment, number = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after(count, call):
    calls = iter(range(int(count)))
    def counted(*arguments):
        if next(calls, None) is None:
            die()
        return call(*arguments)
    return counted

class Dying:
    def __init__(self, file): self.file = file
    def write(self, data):
        if len(data) > 1000:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            die()
        return self.file.write(data)
    def flush(self): self.file.flush()

save = checkpoint.torch.save
if moment == "inside a write":
    saves = iter(range(int(number)))
    checkpoint.torch.save = lambda state, file: save(state, file if next(saves, None) is not None else Dying(file))
elif moment == "before the rename":
    os.replace = after(number, os.replace)
elif moment == "before a log row":
    import train.loop
    train.loop.Log.append = after(number, train.loop.Log.append)
elif moment == "after seconds":
    threading.Thread(target=lambda: (time.sleep(number), die()), daemon=True).start()
tiny_loop(steps=12).run(out, every=2)
"""


def train(out: Path, moment: str = "never", number: float = 0) -> int:
    command = [sys.executable, "-c", TRAINING, str(out), moment, str(number)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
    return ran.returncode


def assert_ends_as_undisturbed(out: Path, undisturbed: Path) -> None:
    """Parameters, averages and log, but for the times in it, are those of a run that nothing stopped."""
    one, other = (tiny_loop(steps=12) for _ in range(2))
    assert one.resume(out / "checkpoint.pt")
    assert other.resume(undisturbed / "checkpoint.pt")
    assert torch.equal(parameters(one), parameters(other))
    for name, average in one.stage.average.tensors.items():
        assert torch.equal(average, other.stage.average.tensors[name])
    steps = [[row["step"] for row in Log(folder / "log.jsonl").rows()] for folder in (out, undisturbed)]
    assert steps[0] == steps[1] == [2, 4, 6, 8, 10, 12]


def kill_and_resume(out: Path, moment: str, number: float) -> bool:
    """Whether the run was killed; what it left is a whole checkpoint or none, and it goes on from there."""
    killed = train(out, moment, number) != 0
    before = load_checkpoint(out / "checkpoint.pt")
    loop = tiny_loop(steps=12)
    assert loop.resume(out / "checkpoint.pt") == (before is not None)
    return killed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    tiny_loop(steps=12).run(out, every=2)
    return out


@pytest.mark.parametrize(("moment", "number"), [("inside a write", 2), ("before the rename", 3)])
def test_a_run_killed_while_it_saves_goes_on_to_the_same_end(tmp_path, undisturbed, moment, number):
    assert kill_and_resume(tmp_path, moment, number)
    assert load_checkpoint(tmp_path / "checkpoint.pt").done == 2 * number
    tiny_loop(steps=12).run(tmp_path, every=2)
    assert_ends_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.slow
def test_runs_killed_at_any_moment_go_on_to_the_same_end(tmp_path, undisturbed):
    chosen, killed = random.Random(0), 0
    for number in range(5):
        out = tmp_path / str(number)
        for _ in range(chosen.choice((1, 2, 3))):
            moments = ("inside a write", "before the rename", "before a log row")
            killed += kill_and_resume(out, chosen.choice(moments), chosen.randrange(5))
            killed += kill_and_resume(out, "after seconds", chosen.uniform(0, 0.2))
        assert train(out) == 0
        assert_ends_as_undisturbed(out, undisturbed)
    assert killed >= 5
