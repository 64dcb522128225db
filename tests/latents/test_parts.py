"""A job that several processes share: each writes a part, and a reader sees all of them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoding_jobs import CountingEncoder, contents, make_video, shards

from k5kernels.folder import Folder
from k5kernels.latents.job import EncodeSummary, encode_videos
from k5kernels.lock import LockedError, locked, this_process
from train.latents import read_shards

Encode = Callable[..., EncodeSummary]
NAMES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def encode(tmp_path: Path, encoder: CountingEncoder) -> Encode:
    for number, name in enumerate(NAMES):
        make_video(tmp_path / "videos" / f"{name}.mp4", 10, seed=number)

    def run(out: str | Path = tmp_path / "out", **settings: Any) -> EncodeSummary:
        return encode_videos(
            [tmp_path / "videos"], encoder, out, **{"clip_frames": 5, "samples_per_shard": 2} | settings
        )

    return run


def keys(out: Path) -> list[str]:
    return sorted(sample.key for shard in shards(out) for sample in shard)


def test_the_parts_are_the_whole(encode: Encode, tmp_path: Path, encoder: CountingEncoder) -> None:
    encode(out=tmp_path / "alone")
    encoder.clips = 0
    for index in (2, 0, 1):
        encode(index=index, of=3)
    assert encoder.clips == 12
    assert keys(tmp_path / "out") == keys(tmp_path / "alone")
    assert len(list(read_shards(tmp_path / "out"))) == 12
    assert {name.split("-")[0] for name in contents(tmp_path / "out")} == {"0000", "0001", "0002"}
    before = contents(tmp_path / "out")
    summaries = [encode(index=index, of=3) for index in range(3)]
    assert all((summary.samples, summary.failures) == (12, {}) for summary in summaries)
    assert encoder.clips == 12
    assert contents(tmp_path / "out") == before


def test_parts_run_at_the_same_time(encode: Encode, tmp_path: Path) -> None:
    encode(out=tmp_path / "alone")
    errors: list[BaseException] = []

    def part(index: int) -> None:
        try:
            encode(index=index, of=3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=part, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert keys(tmp_path / "out") == keys(tmp_path / "alone")


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_processes_goes_on(
    encode: Encode, tmp_path: Path, encoder: CountingEncoder, first: int, then: int
) -> None:
    """The first process of the first number is stopped after three clips: a shard, and half of the next."""
    encode(out=tmp_path / "alone")
    encoder.clips = 0

    class Killed(CountingEncoder):
        def forward(self, video: Any) -> Any:
            if self.clips == 3:
                raise KeyboardInterrupt
            return CountingEncoder.forward(self, video)

    encoder.__class__ = Killed
    index = 0
    while True:
        try:
            encode(index=index, of=first)
        except KeyboardInterrupt:
            break
        index += 1
    encoder.__class__ = CountingEncoder
    before = contents(tmp_path / "out")
    for index in range(then):
        encode(index=index, of=then)
    assert keys(tmp_path / "out") == keys(tmp_path / "alone")
    after = contents(tmp_path / "out")
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))


def test_another_job_is_refused_whichever_part_it_is(encode: Encode, tmp_path: Path) -> None:
    encode(index=0, of=2)
    for settings in ({}, {"index": 1, "of": 2}, {"index": 0, "of": 2}):
        with pytest.raises(ValueError, match=r"belongs to another job \(clip_frames 5 there, 9 now\)"):
            encode(clip_frames=9, **settings)
    encode(clip_frames=9, overwrite=True)
    assert {name.split("-")[0] for name in contents(tmp_path / "out")} == {
        *(f"{number:05d}.tar" for number in range(3)),
        "manifest.json",
    }


@pytest.mark.parametrize(
    ("job", "of", "words"),
    [("another", 2, "another job"), (None, 3, "this job shared among 3, not 2")],
)
def test_a_part_of_another_job_that_is_running_is_refused(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, of: int, words: str
) -> None:
    from k5kernels.latents import job as module

    ids: list[str] = []
    real = module.job_id
    monkeypatch.setattr(module, "job_id", lambda settings: ids.append(real(settings)) or ids[-1])
    encode(index=1, of=2)
    holder = this_process(job or ids[0], of)
    with locked(Folder(tmp_path / "out"), "0000-encode.lock", holder):
        with pytest.raises(ValueError, match=words):
            encode(index=1, of=2)
        with pytest.raises(LockedError, match="is being written"):
            encode(index=0, of=2)
    encode(index=0, of=2)
