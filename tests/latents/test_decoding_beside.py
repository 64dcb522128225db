"""Sources are read beside the encoder: shards do not depend on it, and what it takes is told."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding_jobs import CountingEncoder, Encode, contents, make_video
from torch import Tensor

from k5kernels.latents import encode as encode_module
from k5kernels.latents.job import Step
from k5kernels.latents.video import Clip, read_clips


@pytest.mark.parametrize("decoders", [1, 2, 5])
def test_shards_are_the_same_whichever_thread_is_first(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: int
) -> None:
    encode(out=tmp_path / "expected", decoders=1)

    def late(path: str, *arguments: Any) -> Iterator[Clip]:
        time.sleep({"a.mp4": 0.05, "b.mp4": 0.02}.get(Path(path).name, 0))
        yield from read_clips(path, *arguments)

    monkeypatch.setattr(encode_module, "read_clips", late)
    encode(decoders=decoders)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_the_next_source_is_read_while_one_is_encoded(
    encode: Encode, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {name: threading.Event() for name in "abc"}
    waited: list[bool] = []

    def read(path: str, *arguments: Any) -> Iterator[Clip]:
        begun[Path(path).stem].set()
        yield from read_clips(path, *arguments)

    class Waiting(CountingEncoder):
        def forward(self, video: Tensor) -> Tensor:
            if self.clips == 0:
                waited.append(begun["b"].wait(10))
            return CountingEncoder.forward(self, video)

    monkeypatch.setattr(encode_module, "read_clips", read)
    encoder.__class__ = Waiting
    assert encode().samples == 6
    assert waited == [True]


def test_the_shares_of_a_runs_time_are_told(encode: Encode, encoder: CountingEncoder, folder: Path) -> None:
    class Slow(CountingEncoder):
        def forward(self, video: Tensor) -> Tensor:
            time.sleep(0.02)
            return CountingEncoder.forward(self, video)

    encoder.__class__ = Slow
    steps: list[Step] = []
    seconds = encode(progress=steps.append).seconds
    assert seconds.encode >= 6 * 0.02
    assert 0 < seconds.wait + seconds.encode + seconds.write <= seconds.run
    assert seconds.decode > 0
    assert seconds.resize > 0
    assert steps[-1].seconds.encode == pytest.approx(seconds.encode)
    assert [one.seconds.run for one in steps] == sorted(one.seconds.run for one in steps)
    assert str(seconds).startswith(f"{seconds.run:.1f} s: encode {seconds.encode / seconds.run:.1%}, wait ")
    again = encode()
    assert (again.samples, again.seconds.encode) == (6, 0)


def test_a_stopped_run_leaves_no_thread(encode: Encode, encoder: CountingEncoder, folder: Path) -> None:
    class Killed(CountingEncoder):
        def forward(self, video: Tensor) -> Tensor:
            raise KeyboardInterrupt

    make_video(folder / "d.mp4", 50)
    encoder.__class__ = Killed
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        encode(decoders=4)
    assert threading.active_count() == before


@pytest.mark.parametrize("decoders", [0, 65])
def test_threads_are_counted_from_one(encode: Encode, decoders: int) -> None:
    with pytest.raises(ValueError, match=f"decoders: expected 1 to 64 threads, got {decoders}"):
        encode(decoders=decoders)


def test_clips_wait_in_bounded_memory(
    encode: Encode, folder: Path, encoder: CountingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one clip: while one is encoded, one waits, and one more is made."""
    made: list[str] = []
    counts: list[int] = []
    frames = torch.zeros(5, 256, 256, 3, dtype=torch.uint8)

    def read(path: str, *arguments: Any) -> Iterator[Clip]:
        for clip in read_clips(path, *arguments):
            made.append(Path(path).name)
            yield clip

    class Waiting(CountingEncoder):
        def forward(self, video: Tensor) -> Tensor:
            if self.clips == 0:
                time.sleep(0.3)
                counts.append(len(made))
            return CountingEncoder.forward(self, video)

    monkeypatch.setattr(encode_module, "read_clips", read)
    monkeypatch.setattr("k5kernels.latents.job.WAITING_BYTES", frames.numel())
    encoder.__class__ = Waiting
    encode([make_video(folder / "long.mp4", 40)])
    assert counts == [3]
