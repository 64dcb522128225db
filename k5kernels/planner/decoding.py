"""Memory of decoding a video on a card: the tiles that the released pipeline cuts it into, and what a tile takes.

The released pipeline decodes 17 frames at a time. Each frame is cut into as few tiles as the card's free memory, by
its reckoning of 8 bytes a value of the decoder's widest layer, and the 2³¹ values of one tensor allow. Neighbours
overlap by 32 pixels. The decoder's tensors themselves take 9 bytes a value, as a tracker under fake tensors counts
them (bench/lora_memory.py); where the card has room the allocator keeps more of what was freed, which Table 5 shows.
"""

import math

from k5kernels.planner.shapes import ClipShape

VAE_BYTES = 2 * 246.5e6  # the HunyuanVideo VAE in float16
IMAGE_VAE_BYTES = 2 * 83.8e6  # the FLUX VAE
CHANNELS = 256  # of the decoder's widest layer at full size
FRAMES = 17  # of a tile
MOST_VALUES = 2**31
PLANNED_BYTES = 8  # a value, by the released pipeline's reckoning
LIVE_BYTES = 9.06  # a value, tracked
OVERLAP = 32  # pixels of two tiles


def tile(clip: ClipShape, free_bytes: float) -> tuple[int, int]:
    """(height, width) in pixels of the tiles of a clip where so much memory is free."""
    height, width = clip.height, clip.width
    largest_area = max(1.0, free_bytes / (PLANNED_BYTES * CHANNELS * FRAMES))
    values = CHANNELS * FRAMES * (height + OVERLAP) * (width + OVERLAP)
    if height * width < largest_area and values < MOST_VALUES:
        return height, width
    tiles = max(math.ceil(height * width / largest_area), math.ceil(values / MOST_VALUES))
    longer, shorter = max(height, width), min(height, width)
    along, across = math.ceil(math.sqrt(tiles * longer / shorter)), math.ceil(math.sqrt(tiles * shorter / longer))
    rows, columns = (along, across) if height > width else (across, along)
    return _side(height, rows), _side(width, columns)


def _side(pixels: int, tiles: int) -> int:
    """Of one tile, overlap included, in whole latent pixels."""
    return pixels if tiles == 1 else math.ceil(pixels / tiles / 8) * 8 + OVERLAP // 2


def tile_values(clip: ClipShape, free_bytes: float) -> int:
    """Values of the decoder's widest layer for one tile; 0 for an image, which has a VAE of its own."""
    if clip.frames == 1:
        return 0
    height, width = tile(clip, free_bytes)
    return CHANNELS * min(FRAMES, clip.frames) * height * width


def working_bytes(clip: ClipShape, free_bytes: float, kept_bytes: float) -> float:
    """What decoding takes beside the VAE's weights.

    kept_bytes: a value, with what the allocator keeps where it has room (fitted to Table 5).
    """
    values = tile_values(clip, free_bytes)
    return min(kept_bytes * values, max(LIVE_BYTES * values, free_bytes))
