"""The statistics that a clip is streamed by, from a sample of it whose size does not grow with the clip (§7.1).

The sample is a few windows of consecutive frames at full size, one in the middle of each of as many equal parts of the
clip. A window begins as a clip does, with copies of its first frame before it. That frame is a poor sample of what is
inside a clip, so only the window's other frames count.
"""

from typing import NamedTuple

from torch import Tensor

from k5kernels.vae.config import TEMPORAL_STRIDE
from k5kernels.vae.passes import Statistics, Storage, layer_by_layer
from k5kernels.vae.steps import Step

WINDOWS, WINDOW_FRAMES = 3, 9


class Sample(NamedTuple):
    """Which frames of a clip its statistics come from: frames of the video for an encoder, latent frames for a decoder.

    chunks: (first, end), in order. openings: numbers of the chunks that a window begins with and that do not count.
    """

    chunks: tuple[tuple[int, int], ...]
    openings: frozenset[int]

    def in_latents(self) -> "Sample":
        """The same sample of the latents that a decoder takes."""
        return Sample(tuple((_latent(first), _latent(end)) for first, end in self.chunks), self.openings)

    def windows(self) -> list[tuple[int, int]]:
        """(first, end) of each."""
        starts = sorted(self.openings)
        ends = [*starts[1:], len(self.chunks)]
        return [(self.chunks[start][0], self.chunks[end - 1][1]) for start, end in zip(starts, ends, strict=True)]


def sample_of(frames: int, chunk: int) -> Sample:
    """Of a clip of so many video frames, in chunks of so many, a multiple of 4."""
    chunks, openings = list[tuple[int, int]](), list[int]()
    for number in range(WINDOWS):
        middle = frames * (2 * number + 1) // (2 * WINDOWS)
        # Where a latent's four frames end.
        first = (middle - WINDOW_FRAMES // 2) // TEMPORAL_STRIDE * TEMPORAL_STRIDE
        end = first + WINDOW_FRAMES
        openings.append(len(chunks))
        chunks.append((first, first + 1))
        chunks += [(start, min(start + chunk, end)) for start in range(first + 1, end, chunk)]
    return Sample(tuple(chunks), frozenset(openings))


def statistics_of_sample(steps: list[Step], clip: Tensor, sample: Sample, resident_bytes: int | None) -> Statistics:
    """What each step normalizes the clip [B, C, T, H, W] by.

    resident_bytes: of activations that stay on the device between two steps; None: all.
    """
    with Storage(resident_bytes) as storage:
        chunks = (clip[:, :, first:end] for first, end in sample.chunks)
        return layer_by_layer(steps, chunks, storage, sample.openings)[1]


def _latent(frame: int) -> int:
    """The latent frame that a video frame belongs to."""
    return -(-frame // TEMPORAL_STRIDE)
