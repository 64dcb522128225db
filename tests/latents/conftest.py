"""The encoding job of a small folder, as most tests of the job run it."""

from pathlib import Path
from typing import Any

import pytest
from encoding_jobs import CountingEncoder, Encode, make_video

from k5kernels.latents.job import EncodeSummary, encode_videos


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos of 11, 5 and 15 frames: 2, 1 and 3 clips of five frames."""
    for name, frames in (("a", 11), ("b", 5), ("c", 15)):
        make_video(tmp_path / "videos" / f"{name}.mp4", frames, seed=frames)
    return tmp_path / "videos"


@pytest.fixture
def encode(folder: Path, tmp_path: Path, encoder: CountingEncoder) -> Encode:
    """`encode_videos` of the folder in clips of 5 frames, 2 a shard, unless told otherwise."""

    def run(paths: list[Path] | None = None, out: str | Path = tmp_path / "out", **settings: Any) -> EncodeSummary:
        encoder.clips = 0
        return encode_videos(paths or [folder], encoder, out, **{"clip_frames": 5, "samples_per_shard": 2} | settings)

    return run
