"""A job over very many sources: memory and open files stay bounded, and nothing that is known is done again."""

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from encoding_jobs import CountingEncoder
from memory_folder import memory_folder
from simulated_tree import FILES, simulate_tree

from k5kernels.folder import Folder
from k5kernels.latents import reader
from k5kernels.latents.encode import Encoding
from k5kernels.latents.job import EncodeSummary, encode_videos
from k5kernels.latents.journal import Journal
from k5kernels.latents.video import VideoError

BYTES, BYTES_A_SOURCE = 16 << 20, 4000  # of memory, at most
OPEN_FILES = 24


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The simulated files that were read; each holds its name, and no video."""
    read: list[str] = []

    def content_hash(file: str) -> str:
        read.append(file)
        return hashlib.sha256(file.encode()).hexdigest()

    def clips(self: Encoding, file: str) -> Iterator[Any]:
        raise VideoError(f"{file}: expected a video")
        yield

    monkeypatch.setattr(reader, "content_hash", content_hash)
    monkeypatch.setattr(reader, "_stamp", lambda file: (0, 0))
    monkeypatch.setattr(Encoding, "clips", clips)
    return read


def memory(name: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at most since that was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def encode(videos: Path, out: Path) -> EncodeSummary:
    return encode_videos([videos], CountingEncoder(), out, clip_frames=1)


@pytest.mark.parametrize("folders", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_sources_take_bounded_memory_and_few_open_files(
    folders: int, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = folders * FILES
    with memory_folder() as root:
        simulate_tree(root / "videos", folders, monkeypatch)
        encode(root / "videos" / "0000", root / "other")  # what is loaded and set up once
        hashed.clear()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + OPEN_FILES, hard))
        before = memory("VmRSS")
        # Python's own tracing would take three times as long.
        Path("/proc/self/clear_refs").write_text("5")
        try:
            first = encode(root / "videos", root / "out")
            journal = Journal.load(Folder(root / "out"), "")
            second = encode(root / "videos", root / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.listdir(root / "out") == ["manifest.json"]
    assert memory("VmHWM") - before < BYTES + BYTES_A_SOURCE * count
    assert len(first.failures) == len(second.failures) == count
    assert journal is not None
    assert [entry.whole for entry in journal.manifest.sources] == [True] * count
    # Each was read once to be encoded, and once more to see that it is the same still.
    assert len(hashed) == 2 * count
