"""A video cut in clips, each with what is true of the frames in it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.latents.video.buckets import Bucket, nearest_bucket
from k5kernels.latents.video.container import OpenVideo, open_video
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.frames import fit_image
from k5kernels.latents.video.reading import AS_MODELS, Reading
from k5kernels.latents.video.shown import Shown, shown_frames
from k5kernels.vae.config import TEMPORAL_STRIDE

# A clip has motion: more than the first latent frame, which stands for one frame alone.
MIN_FRAMES = 1 + TEMPORAL_STRIDE
MAX_DENOMINATOR = 10_000


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [F, height, width, 3], F = 1 + a multiple of 4; no break lies between them.

    first_frame: number of the first one among the frames read. rate: frames/s, None for a picture.
    start, end: when the first one is shown, and until when the last one is [s], from the start of the file.
    shown_height, shown_width: pixels of a frame as a player shows it. colour: what it was and what was done.
    announced_frames: how many frames the file says it has at this rate, 0 where it does not. resize_seconds: what the
    cutting and resizing of its frames took.
    """

    frames: Tensor
    first_frame: int
    rate: Fraction | None
    start: Fraction
    end: Fraction
    shown_height: int
    shown_width: int
    colour: str
    announced_frames: int
    resize_seconds: float = field(default=0.0, compare=False)


def read_clips(
    path: str | Path, resolution: int | tuple[Bucket, ...], clip_frames: int, reading: Reading = AS_MODELS
) -> Iterator[Clip]:
    """The clips of a video in turn, one in memory at a time, each in the bucket nearest to its shape.

    A break in the video, or another frame size, ends a clip. Of what remains at an end, the first 1 + 4n frames are
    one more, shorter clip where there are at least 5; frames beyond that are dropped. A picture is a clip of one frame.
    clip_frames: 1 + a multiple of 4.
    Raises VideoError and OSError as `decode`; VideoError also where not one clip comes out.
    """
    least = min(MIN_FRAMES, clip_frames)
    count, longest, clips = 0, 0, 0
    with open_video(path) as video:
        frames = shown_frames(video, reading)
        for _, run in groupby(frames, key=lambda shown: (shown.part, shown.image.shape)):
            before = count
            for taken, clip in _cut(run, video, resolution, clip_frames, reading.fps, count):
                count += taken
                if clip is not None:
                    clips += 1
                    yield clip
            longest = max(longest, count - before)
    if not clips and longest == count:
        raise VideoError(f"{path}: expected a video of at least {least} frames, decoded {count}")
    if not clips:
        raise VideoError(f"{path}: expected at least {least} frames without a break, found {longest} of {count}")


def _cut(
    run: Iterator[Shown],
    video: OpenVideo,
    resolution: int | tuple[Bucket, ...],
    clip_frames: int,
    fps: Fraction | None,
    first: int,
) -> Iterator[tuple[int, Clip | None]]:
    """(frames taken, the clip of them or None where they are too few) of frames without a break among them."""
    opening = next(run)
    shown_height, shown_width = opening.image.shape[:2]
    height, width = nearest_bucket(shown_height, shown_width, resolution)
    least = 1 if opening.still else min(MIN_FRAMES, clip_frames)
    run = chain([opening], run)
    spent = 0.0

    def fitted(image: Tensor) -> Tensor:
        nonlocal spent
        began = time.perf_counter()
        fit = fit_image(image, height, width, video.path)
        spent += time.perf_counter() - began
        return fit

    while taken := [(fitted(shown.image), shown.start, shown.end) for shown in islice(run, clip_frames)]:
        count = len(taken) - (len(taken) - 1) % TEMPORAL_STRIDE
        if count < least:
            yield len(taken), None
            return
        images, starts, ends = zip(*taken[:count], strict=True)
        rate = None if opening.still else fps or _rate(starts, ends[-1], video)
        yield (
            len(taken),
            Clip(
                torch.stack(images),
                first,
                rate,
                starts[0],
                ends[-1],
                shown_height,
                shown_width,
                opening.colour,
                video.announced_frames(fps),
                spent,
            ),
        )
        first, spent = first + len(taken), 0.0


def _rate(starts: tuple[Fraction, ...], end: Fraction, video: OpenVideo) -> Fraction:
    """Frames/s of frames shown from these times on: what the file announces where it is true, else their mean."""
    unit = Fraction(video.stream.time_base)
    steps = enumerate((*starts, end))
    if all(abs(time - starts[0] - number / video.rate) <= 3 * unit / 2 for number, time in steps):
        return video.rate
    if end <= starts[0]:
        return video.rate
    return (len(starts) / (end - starts[0])).limit_denominator(MAX_DENOMINATOR)
