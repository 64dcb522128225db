"""Manifests and their changes: they read back, they may be applied again, and writing one costs what it adds."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from k5kernels.folder import Folder
from k5kernels.latents import journal as journal_module
from k5kernels.latents.journal import Journal, change_name
from k5kernels.latents.manifest import (
    Change,
    Manifest,
    ManifestError,
    Outcome,
    Piece,
    ShardEntry,
    SourceEntry,
    change_from_json,
    change_to_json,
    manifest_from_json,
    manifest_to_json,
)

SHA = "0123456789abcdef" * 4


def changes() -> list[Change]:
    """What two runs do."""
    return [
        Change(arrived=(0, (SourceEntry("a.mp4"), SourceEntry("caf\udce9/b.mp4")))),
        Change(
            shards=((0, ShardEntry(10, (Piece(0, 0, 3), Piece(1, 0, 1)))),),
            outcomes=(Outcome(0, SHA, True), Outcome(1, SHA, False)),
        ),
        Change(outcomes=(Outcome(1, SHA, True, "is broken"),)),
        Change(arrived=(2, (SourceEntry("0.mp4", SHA),))),
        Change(shards=((1, ShardEntry(20, (Piece(2, 0, 4),))),)),
        Change(shards=((0, ShardEntry(11, (Piece(0, 0, 3), Piece(1, 0, 1)))),)),
        Change(outcomes=(Outcome(1, SHA, True),)),
    ]


def manifest(made: list[Change] | None = None) -> Manifest:
    whole = Manifest({"resolution": 256})
    for change in changes() if made is None else made:
        whole.apply(change)
    return whole


def test_manifest_reads_back() -> None:
    for count in range(len(changes()) + 1):
        whole = manifest(changes()[:count])
        assert manifest_from_json(manifest_to_json(whole)) == whole
    assert [(entry.source, entry.clips, entry.whole) for entry in manifest().sources] == [
        ("a.mp4", 3, True),
        ("caf\udce9/b.mp4", 1, True),
        ("0.mp4", 4, False),
    ]
    assert manifest().batches == [0, 2]


def test_changes_read_back() -> None:
    for number, change in enumerate(changes()):
        assert change_from_json(number, change_to_json(number, change)) == change


@pytest.mark.parametrize("count", range(len(changes()) + 1))
def test_the_last_changes_may_be_applied_again(count: int) -> None:
    whole = manifest()
    for change in changes()[count:]:
        whole.apply(change)
    assert whole == manifest()


@pytest.mark.parametrize(
    "wrong",
    [
        Change(arrived=(1, (SourceEntry("x"),))),
        Change(arrived=(4, (SourceEntry("x"),))),
        Change(shards=((3, ShardEntry(1, ())),)),
        Change(shards=((-1, ShardEntry(1, ())),)),  # a negative place would be the last one's
        Change(shards=((-(2**70), ShardEntry(1, ())),)),
        Change(shards=((2, ShardEntry(1, (Piece(9, 0, 1),))),)),
        Change(shards=((2, ShardEntry(1, (Piece(0, 0, 0),))),)),
        Change(outcomes=(Outcome(-1, SHA, True),)),
    ],
)
def test_a_change_that_does_not_follow_is_refused(wrong: Change) -> None:
    with pytest.raises(ManifestError, match="expected"):
        manifest().apply(wrong)


def test_newer_manifest_is_refused_with_the_remedy() -> None:
    stored = json.loads(manifest_to_json(manifest())) | {"version": 3}
    with pytest.raises(ManifestError, match="expected at most version 2, got 3; go on with a newer k5kernels"):
        manifest_from_json(json.dumps(stored).encode())


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (manifest_to_json(manifest()), manifest_from_json),
        (change_to_json(7, changes()[1]), partial(change_from_json, 7)),
    ],
    ids=["manifest", "change"],
)
def test_a_byte_less_or_another_byte_is_refused(data: bytes, read: Callable[[bytes], object]) -> None:
    read(data)
    draw = random.Random(0)
    for place in range(len(data)):
        other = data[place] ^ (1 << draw.randrange(8))
        for damaged in (
            data[:place],
            data[:place] + data[place + 1 :],
            data[:place] + bytes([other]) + data[place + 1 :],
        ):
            with pytest.raises(ManifestError) as error:
                read(damaged)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 500


def test_a_change_under_another_number_is_refused() -> None:
    with pytest.raises(ManifestError, match="expected change 6, got 7"):
        change_from_json(6, change_to_json(7, changes()[1]))


def test_a_count_of_clips_that_is_not_that_of_the_shards_is_refused() -> None:
    whole = manifest()
    whole.sources[0].clips = 4
    with pytest.raises(ManifestError, match=r"expected 4 clips of 'a\.mp4' in shards, found 3"):
        manifest_from_json(manifest_to_json(whole))


@pytest.mark.parametrize("number", [0, 2, 6])
def test_a_missing_change_in_between_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The first one may be gone without harm when the manifest holds it, and the last one is as if not yet made."""
    monkeypatch.setattr(journal_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(journal_module, "GROWTH", 0)
    journal = Journal(Folder(tmp_path), "", Manifest({"resolution": 256}))
    journal.write_whole()
    for change in changes():
        journal.commit(change)
    journal.folder.remove(change_name("", number))
    if number == 6:
        loaded = Journal.load(journal.folder, "")
        assert loaded is not None
        assert loaded.manifest == manifest(changes()[:6])
        return
    words = {0: "change00000001.json: is damaged.*expected one of 0 sources", 2: "change00000003.json: .*2, is missing"}
    with pytest.raises(ManifestError, match=words[number] + ".*; put a copy back, or give another folder"):
        Journal.load(journal.folder, "")


@pytest.fixture(params=["{tmp}", "memory://test_manifest{tmp}"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    made = Folder(request.param.format(tmp=tmp_path))
    made.create()
    return made


@pytest.mark.parametrize("small", [0, 1 << 18])
def test_journal_is_whole_after_every_change(folder: Folder, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(journal_module, "SMALL_BYTES", small)
    journal = Journal(folder, "", Manifest({"resolution": 256}))
    for count, change in enumerate(changes(), start=1):
        journal.commit(change)
        loaded = Journal.load(folder, "")
        assert loaded is not None
        assert loaded.manifest == manifest(changes()[:count])
        journal = loaded
    journal.close()
    assert list(folder.sizes()) == ["manifest.json"]
    assert folder.read("manifest.json") == manifest_to_json(manifest())


def test_journal_that_is_stopped_while_it_puts_its_changes_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(journal_module, "GROWTH", 0)
    folder = Folder(tmp_path)
    journal = Journal(folder, "", Manifest({"resolution": 256}))
    journal.write_whole()
    for change in changes():
        journal.commit(change)
    assert len(folder.sizes()) == 1 + len(changes())
    remove, removed = Folder.remove, []

    def stop(self: Folder, name: str) -> None:
        removed.append(name)
        if len(removed) == 4:
            raise KeyboardInterrupt
        remove(self, name)

    monkeypatch.setattr(Folder, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        journal.close()
    monkeypatch.setattr(Folder, "remove", remove)
    loaded = Journal.load(folder, "")
    assert loaded is not None
    assert loaded.manifest == manifest()
    loaded.close()
    assert list(folder.sizes()) == ["manifest.json"]


def test_a_manifest_of_many_sources_costs_what_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 sources, 10 to a shard: written are a few times the bytes of the manifest, not their square."""
    written = []
    write = Folder.write
    monkeypatch.setattr(journal_module.Folder, "write", lambda self, name, data: written.append(len(data)))
    monkeypatch.setattr(journal_module.Folder, "remove", lambda self, name: None)
    assert write
    journal = Journal(Folder(tmp_path), "", Manifest({}))
    journal.commit(Change(arrived=(0, tuple(SourceEntry(f"folder/{n:05d}.mp4") for n in range(20_000)))))
    for number in range(2000):
        sources = range(10 * number, 10 * number + 10)
        shard = ShardEntry(1000, tuple(Piece(source, 0, 1) for source in sources))
        journal.commit(Change(shards=((number, shard),), outcomes=tuple(Outcome(s, SHA, True) for s in sources)))
    journal.close()
    assert sum(written) < 8 * len(manifest_to_json(journal.manifest))
