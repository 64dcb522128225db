"""The resolution buckets of pre-training (Table 4 of the report)."""

import math

# height x width, by the short side's class; Table 4 of the report.
BUCKETS: dict[int, tuple[tuple[int, int], ...]] = {
    256: ((256, 256), (256, 384), (384, 256)),
    512: ((512, 512), (512, 768), (768, 512)),
    1024: ((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152)),
}


def nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) of the bucket of that class whose aspect ratio is nearest, by ratio.

    Raises ValueError for a resolution without buckets and for sides below 1.
    """
    if resolution not in BUCKETS:
        raise ValueError(f"resolution: expected one of {sorted(BUCKETS)}, got {resolution}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width: expected at least 1 pixel, got {height}×{width}")
    return min(BUCKETS[resolution], key=lambda side: abs(math.log(side[0] / side[1] * width / height)))
