"""The resolution buckets of pre-training (Tables 2 and 4 of the report)."""

import math

from k5kernels.vae.config import SPATIAL_STRIDE

Bucket = tuple[int, int]  # height, width [pixels]

# By the short side's class: 512 is Table 2's Lite, 1024 its Pro, 256 the video models' low resolution of Table 4.
BUCKETS: dict[int, tuple[Bucket, ...]] = {
    256: ((256, 256), (256, 384), (384, 256)),
    512: ((512, 512), (512, 768), (768, 512)),
    1024: ((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152)),
}


def buckets_of(resolution: int | tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """The buckets of a class, or those that are given themselves.

    Raises ValueError for a class without buckets, and for sides that are no multiples of the VAE's stride.
    """
    if isinstance(resolution, int):
        if resolution not in BUCKETS:
            raise ValueError(f"resolution: expected one of {sorted(BUCKETS)}, got {resolution}")
        return BUCKETS[resolution]
    if not resolution or any(side < 1 or side % SPATIAL_STRIDE for bucket in resolution for side in bucket):
        raise ValueError(f"resolution: expected sides that are multiples of {SPATIAL_STRIDE}, got {resolution!s:.120}")
    return resolution


def nearest_bucket(height: int, width: int, resolution: int | tuple[Bucket, ...]) -> Bucket:
    """(height, width) of the bucket whose aspect ratio is nearest, by the ratio of the two ratios.

    resolution: a class of BUCKETS, or the buckets themselves.
    Raises ValueError as `buckets_of`, and for sides below 1.
    """
    buckets = buckets_of(resolution)
    if height < 1 or width < 1:
        raise ValueError(f"height and width: expected at least 1 pixel, got {height}×{width}")
    return min(buckets, key=lambda side: abs(math.log(side[0] / side[1] * width / height)))
