"""The statistics that a clip is streamed by, from a sample of it whose size does not grow with the clip (§7.1).

A window of consecutive frames at full size has the statistics of these frames exactly. What changes over the clip it
cannot know: that comes from the clip at half its sides, the pilot. Small frames have other statistics than large ones,
so the pilot gives only the difference between the clip and the window, both of them small:

    mean     = window's mean + clip's mean, small - window's mean, small
    variance = window's variance * clip's variance, small / window's variance, small

A clip longer than the pilot may be is represented by windows of it, evenly spread.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from k5kernels.ops.groupnorm_statistics import GroupStatistics
from k5kernels.vae.config import TEMPORAL_STRIDE
from k5kernels.vae.passes import Statistics, Storage, layer_by_layer
from k5kernels.vae.steps import Step

WINDOW_FRAMES = 9
PILOT_SCALE = 2
PILOT_FRAMES = 129  # at most; of a longer clip, windows
PILOT_WINDOWS, PILOT_WINDOW_FRAMES = 7, 17
LEAST_VARIANCE = 1e-12  # below this a group's variance says nothing about a ratio


class Sample(NamedTuple):
    """Which frames of a clip its statistics come from, as (first, end).

    window: at full size. pilot: at half its sides. follows: whether the pilot's parts follow on each other; else each
    is a clip of its own. Frames of the video for an encoder, latent frames for a decoder.
    """

    window: tuple[int, int]
    pilot: tuple[tuple[int, int], ...]
    follows: bool

    def in_latents(self) -> "Sample":
        """The same sample of the latents that a decoder takes."""
        window, *pilot = ((_latent(first), _latent(end)) for first, end in (self.window, *self.pilot))
        return Sample(window, tuple(pilot), self.follows)


def sample_of(frames: int, chunks: Sequence[int]) -> Sample:
    """Of a clip of so many video frames, taken in such chunks."""
    window = _spread(frames, 1, WINDOW_FRAMES)[0]
    if frames > PILOT_FRAMES:
        return Sample(window, tuple(_spread(frames, PILOT_WINDOWS, PILOT_WINDOW_FRAMES)), follows=False)
    ends = [sum(chunks[: count + 1]) for count in range(len(chunks))]
    return Sample(window, tuple(zip([0, *ends[:-1]], ends, strict=True)), follows=True)


def statistics_of_sample(steps: list[Step], clip: Tensor, sample: Sample, resident_bytes: int | None) -> Statistics:
    """What each step normalizes the clip [B, C, T, H, W] by.

    resident_bytes: of activations that stay on the device between two steps; None: all.
    """

    def statistics(parts: Iterable[Tensor], follows: bool = True) -> Statistics:
        with Storage(resident_bytes) as storage:
            return layer_by_layer(steps, parts, storage, follows)[1]

    def small(part: tuple[int, int]) -> Tensor:
        frames = clip[:, :, slice(*part)]
        # In float32: a CPU pools no narrower type in three dimensions.
        return F.avg_pool3d(frames.float(), (1, PILOT_SCALE, PILOT_SCALE)).to(frames.dtype)

    window = statistics([clip[:, :, slice(*sample.window)]])
    of_clip = statistics((small(part) for part in sample.pilot), sample.follows)
    of_window = statistics([small(sample.window)])
    return [
        None if full is None or whole is None or part is None else _carried_over(full, whole, part)
        for full, whole, part in zip(window, of_clip, of_window, strict=True)
    ]


def _carried_over(
    window: GroupStatistics, small_clip: GroupStatistics, small_window: GroupStatistics
) -> GroupStatistics:
    ratio = (small_clip.variance + LEAST_VARIANCE) / (small_window.variance + LEAST_VARIANCE)
    return GroupStatistics(window.size, window.mean + small_clip.mean - small_window.mean, window.variance * ratio)


def _latent(frame: int) -> int:
    """The latent frame that a video frame belongs to."""
    return -(-frame // TEMPORAL_STRIDE)


def _spread(frames: int, windows: int, length: int) -> list[tuple[int, int]]:
    """(first, end) of evenly spread windows, one in the middle; each begins where a latent's four frames end."""
    last = frames - length
    starts = [last // 2] if windows == 1 else [last * number // (windows - 1) for number in range(windows)]
    return [(start, start + length) for start in (TEMPORAL_STRIDE * (start // TEMPORAL_STRIDE) for start in starts)]
