"""A checkpoint is whole or not there, and one that is damaged, or another run's, is refused in one line."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from full_disk import fill_disk_in, needs_full_disk

from train.checkpoint import CheckpointError, Checkpoints, Saved, step_name

SETTINGS = {"seed": 0, "model": {"blocks": 2}}
WEIGHTS = {"weights": torch.arange(5000.0), "step": torch.tensor(3.0)}
SHARD = "__0_0.distcp"


def save(folder: Path, done: int, keep: int = 2) -> Path:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.save(done, SETTINGS, WEIGHTS)
    checkpoints.wait()
    assert checkpoints.saved == done
    return folder / step_name(done)


@pytest.fixture
def path(tmp_path):
    return save(tmp_path, 3)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def read(saved: Saved) -> dict[str, torch.Tensor]:
    room = {name: torch.full(stored.shape, torch.nan, dtype=stored.dtype) for name, stored in saved.tensors().items()}
    saved.read_into(room)
    return room


def assert_is_the_one(saved: Saved | None) -> None:
    assert saved is not None
    assert (saved.done, saved.settings) == (3, SETTINGS)
    tensors = read(saved)
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)


def read_newest(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = Checkpoints(folder).newest()
    assert saved is not None
    return read(saved)


def refusal(path: Path) -> str:
    """The one line that refuses the checkpoint; empty where it is taken."""
    try:
        read_newest(path.parent)
    except CheckpointError as error:
        return str(error)
    return ""


def assert_refused(path: Path, *words: str) -> None:
    message = refusal(path)
    assert message.startswith(f"{path}: expected")
    assert "\n" not in message
    assert all(word in message for word in words), message


def write_again(path: Path, **change) -> None:
    """Change the description of a checkpoint and make its checksum right again, as another program might."""
    from train.checkpoint import _digest
    from train.marked_files import mark_of

    content = json.loads((path / "checkpoint.json").read_text()) | change
    del content["sha256"]
    for name in content["files"]:
        content["files"][name] = vars(mark_of(path / name))
    (path / "checkpoint.json").write_text(json.dumps({"sha256": _digest(content), **content}))


def test_a_checkpoint_comes_back(path):
    saved, refused = Checkpoints(path.parent).newest()
    assert_is_the_one(saved)
    assert refused == []


def test_it_comes_back_from_where_it_was_moved_to(path, tmp_path):
    shutil.copytree(path.parent, tmp_path / "elsewhere" / "checkpoints")
    shutil.rmtree(path)
    assert_is_the_one(Checkpoints(tmp_path / "elsewhere" / "checkpoints").newest()[0])


def test_where_there_is_none_nothing_comes(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints").newest() == (None, [])
    (tmp_path / "checkpoints" / "step-000001.partial").mkdir(parents=True)
    assert Checkpoints(tmp_path / "checkpoints").newest() == (None, [])


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoints: expected a folder of checkpoints, found a file"):
        Checkpoints(tmp_path / "checkpoints").newest()


def test_a_copy_is_saved_of_what_the_tensors_are_now(tmp_path):
    weight = torch.zeros(1000)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {"weight": weight})
    weight.fill_(1.0)
    checkpoints.wait()
    saved, _ = checkpoints.newest()
    assert not read(saved)["weight"].any()


def test_every_file_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, replace, fsync = {}, os.replace, os.fsync

    def note(file: int) -> None:
        fsync(file)
        flushed[os.fstat(file).st_ino] = os.fstat(file).st_size

    def name(source: Path, final: Path) -> None:
        if Path(final).name == step_name(1):
            files = [path.stat() for path in Path(source).iterdir()]
            assert [flushed.get(file.st_ino) for file in files] == [file.st_size for file in files]
            assert len(files) == 3
            assert Path(source).stat().st_ino in flushed
            flushed["named"] = True
        replace(source, final)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", name)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, SETTINGS, WEIGHTS)  # of two tensors: an index that fits a buffer
    checkpoints.wait()
    assert flushed["named"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority each on Linux alone")
def test_it_is_written_at_a_lower_priority_than_the_training_has(tmp_path, monkeypatch):
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, written_at, fsync = priority(), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: written_at.append(priority()) or fsync(file))
    save(tmp_path, 1)
    assert min(written_at) > before
    assert priority() == before


def test_torch_computes_no_checksums_of_its_own_while_one_is_written_and_does_elsewhere(path, tmp_path):
    with zipfile.ZipFile(path / SHARD) as last_tensor:
        assert last_tensor.testzip() is not None
    torch.save(WEIGHTS, tmp_path / "elsewhere")
    with zipfile.ZipFile(tmp_path / "elsewhere") as others:
        assert others.testzip() is None


def test_the_newest_stay(tmp_path):
    for done in (2, 4, 1_000_000, 1_000_002):
        save(tmp_path, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-1000002"]
    save(tmp_path, 1_000_004, keep=3)
    assert len(list(tmp_path.iterdir())) == 3
    assert Checkpoints(tmp_path).newest()[0].done == 1_000_004
    with pytest.raises(ValueError, match="keep: expected at least 1 checkpoint, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_checkpoint_that_is_there_is_not_replaced(path):
    before = contents(path)
    with pytest.raises(FileExistsError, match="step-000003"):
        save(path.parent, 3)
    assert contents(path) == before


def test_an_older_whole_one_is_found_behind_a_damaged_one(path):
    newer = save(path.parent, 5)
    (newer / SHARD).write_bytes(b"")
    saved, (refused,) = Checkpoints(path.parent).newest()
    assert_is_the_one(saved)
    assert str(refused).startswith(f"{newer}: expected a whole checkpoint, found a damaged or foreign one ({SHARD}")


def test_where_all_are_damaged_training_does_not_start_anew(path):
    newer = save(path.parent, 5)
    for folder in (path, newer):
        (folder / SHARD).unlink()
    assert_refused(newer, "No such file", "no older one to go on from")


@pytest.mark.parametrize("content", [b"", b"PK", b"[" * 100_000, b"[1]", b"{}", b"\xff\x00", os.urandom(3000)])
def test_another_description_is_refused(path, content):
    (path / "checkpoint.json").write_bytes(content)
    assert_refused(path, "damaged or foreign")


def test_another_programs_checkpoint_is_refused(path):
    (path / "checkpoint.json").write_text('{"format": 1, "done": 3}')
    assert_refused(path, "format 2", "another program's or version's")


class Code:
    """Its pickle says: touch a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_the_index_is_not_run(path, tmp_path):
    (path / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    write_again(path)
    assert_refused(path, "damaged or foreign", "its index holds pathlib")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_shard_is_not_run(path, tmp_path):
    torch.save({"weights": Code(tmp_path / "ran")}, path / SHARD)
    write_again(path)
    assert_refused(path, "damaged or foreign")
    assert not (tmp_path / "ran").exists()


def test_an_index_that_points_elsewhere_is_refused(path):
    index = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(index.replace(SHARD.encode(), b"../0_0.distc"))
    write_again(path)
    assert_refused(path, "points to '../0_0.distc'")


@pytest.mark.parametrize("name", [SHARD, ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(path, name, share):
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: int(len(whole) * share)])
    assert_refused(path, "damaged")


def test_a_flipped_bit_of_a_weight_is_found(path):
    """torch reads it without a word."""
    whole = bytearray((path / SHARD).read_bytes())
    at = whole.find(WEIGHTS["weights"].numpy().tobytes())
    whole[at + 1000] ^= 16
    (path / SHARD).write_bytes(whole)
    assert_refused(path, f"{SHARD} does not match its checksum")
    write_again(path)
    assert not torch.equal(read_newest(path.parent)["weights"], WEIGHTS["weights"])


def test_whatever_bytes_change_is_refused_or_changes_nothing(path):
    before, chosen = contents(path), random.Random(0)
    refused = 0
    for _ in range(200):
        name = chosen.choice(list(before))
        damaged = bytearray(before[name])
        for _ in range(chosen.choice((1, 3, 30))):
            damaged[chosen.randrange(len(damaged))] = chosen.randrange(256)
        (path / name).write_bytes(damaged)
        if refusal(path):
            refused += 1
            assert_refused(path)
        else:
            assert_is_the_one(Checkpoints(path.parent).newest()[0])
        (path / name).write_bytes(before[name])
    assert refused > 180


@needs_full_disk
@pytest.mark.parametrize("name", [SHARD, ".metadata.tmp"])
def test_a_full_disk_is_an_oserror_that_names_the_checkpoint_and_the_former_one_stays(path, monkeypatch, name):
    before = contents(path)
    with monkeypatch.context() as full:
        fill_disk_in("step-000005.partial", name, full)
        with pytest.raises(OSError, match="No space left on device") as error:
            save(path.parent, 5)
    assert str(error.value).endswith("step-000005'")
    assert contents(path) == before
    assert [folder.name for folder in path.parent.iterdir()] == [path.name]
    save(path.parent, 5)


def test_a_disk_that_fills_half_way_keeps_the_former_checkpoint(path):
    before = contents(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[SHARD]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            save(path.parent, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "step-000005" in str(full.value)
    assert contents(path) == before
    assert [folder.name for folder in path.parent.iterdir()] == [path.name]
