from pathlib import Path

import pytest

from k5kernels.latents.video import write_video
from tests.latents.video_files import RATE, moving_gradient


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "video.mp4", moving_gradient(12, 64, 96), RATE)
    return tmp_path / "video.mp4"
