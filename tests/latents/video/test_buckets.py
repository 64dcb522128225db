"""Every frame size has its nearest bucket."""

import pytest

from k5kernels.latents.video import BUCKETS, nearest_bucket


@pytest.mark.parametrize(
    ("height", "width", "resolution", "bucket"),
    [
        (720, 1280, 512, (512, 768)),
        (1280, 720, 256, (384, 256)),
        (500, 480, 256, (256, 256)),
        (1, 9, 1024, (640, 1408)),
    ],
)
def test_nearest_bucket(height: int, width: int, resolution: int, bucket: tuple[int, int]) -> None:
    assert nearest_bucket(height, width, resolution) == bucket


def test_every_bucket_is_its_own_nearest() -> None:
    for resolution, sides in BUCKETS.items():
        assert [nearest_bucket(height, width, resolution) for height, width in sides] == list(sides)


def test_bucket_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"resolution: expected one of \[256, 512, 1024\], got 300"):
        nearest_bucket(10, 10, 300)
    with pytest.raises(ValueError, match="expected at least 1 pixel, got 0×10"):
        nearest_bucket(0, 10, 256)
