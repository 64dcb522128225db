"""Frames as a player shows them: deinterlaced, resampled, in RGB, with square pixels, the right way up."""

import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import torch
from av.sidedata.sidedata import Type
from torch import Tensor

from k5kernels.latents.video.colour import Colour, colour_of
from k5kernels.latents.video.container import OpenVideo
from k5kernels.latents.video.decoding import Decoded, decoded_frames
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.filters import MAX_PIXELS, Deinterlacer, Look, Renderer
from k5kernels.latents.video.reading import Reading
from k5kernels.latents.video.side_data import side_data
from k5kernels.latents.video.tone_mapping import to_bt709

# How many pixels the transparency is computed of at a time.
PIXELS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Shown:
    """image: uint8 [H, W, 3], RGB in BT.709, square pixels. start, end: when it is shown and until when [s].

    part: number of the frames that follow one another without a break and look alike. still: the file is a picture.
    colour: what it was and what was done, in words.
    """

    image: Tensor
    start: Fraction
    end: Fraction
    part: int
    still: bool
    colour: str


def shown_frames(video: OpenVideo, reading: Reading) -> Iterator[Shown]:
    """All frames that a player shows, or those at `reading.fps`. Raises VideoError as `decoded_frames`, `colour_of`."""
    frames = decoded_frames(video)
    first = next(frames, None)
    if first is None:
        return
    still = first.ends_stream and video.may_be_picture
    look: Look | None = None
    part: _Part | None = None
    for decoded in chain([first], frames):
        colour = colour_of(decoded.frame, video, reading)
        found = _look(decoded.frame, video, colour)
        if part is None or decoded.begins_part or found != look:
            if part is not None:
                yield from part.finish()
            number = 0 if part is None else part.number + 1
            look, part = found, _Part(number, video, found, colour, still, reading)
        yield from part.push(decoded)
    if part is not None:
        yield from part.finish()


class _Part:
    """Frames that follow one another without a break and look alike, on their way through the filters."""

    def __init__(
        self, number: int, video: OpenVideo, look: Look, colour: Colour, still: bool, reading: Reading
    ) -> None:
        self.number, self.colour, self.still = number, colour, still
        self.background = reading.background
        self.unit = Fraction(video.stream.time_base)
        # A picture's duration means nothing.
        self.fps = None if still else reading.fps
        aspect = Fraction(1) if reading.square_pixels else video.sample_aspect
        self.deinterlacer = Deinterlacer(look, self.unit)
        self.renderer = Renderer(video.path, look, self.unit, self.fps, aspect)
        self.spans: deque[tuple[Fraction, Fraction]] = deque()

    def push(self, decoded: Decoded) -> Iterator[Shown]:
        frame = decoded.frame
        frame.time_base, frame.pts = self.unit, round(decoded.start / self.unit)
        frame.duration = round((decoded.end - decoded.start) / self.unit)
        self.spans.append((decoded.start, decoded.end))
        for progressive in self.deinterlacer.push(frame):
            yield from map(self._shown, self.renderer.push(progressive))

    def finish(self) -> Iterator[Shown]:
        for progressive in self.deinterlacer.finish():
            yield from map(self._shown, self.renderer.push(progressive))
        yield from map(self._shown, self.renderer.finish())

    def _shown(self, frame: Any) -> Shown:
        if self.fps is None:
            start, end = self.spans.popleft()
        else:
            start, end = frame.pts / self.fps, (frame.pts + 1) / self.fps
        return Shown(self._image(frame), start, end, self.number, self.still, self.colour.words)

    def _image(self, frame: Any) -> Tensor:
        # Flipped frames have negative strides, and torch has no sums of uint16.
        values = torch.from_numpy(frame.to_ndarray().astype("int32" if self.colour.transfer else "uint8", order="C"))
        rgb = values[..., :3]
        if self.colour.transfer is not None and self.colour.primaries is not None:
            rgb = to_bt709(rgb, self.colour.transfer, self.colour.primaries)
        if not self.colour.alpha:
            return rgb
        return _over(self.background, rgb, values[..., 3:] // 257 if self.colour.transfer else values[..., 3:])


def _over(background: tuple[int, int, int], rgb: Tensor, alpha: Tensor) -> Tensor:
    """uint8 [H, W, 3]: rgb [H, W, 3] before the background, by alpha [H, W, 1], both 0 to 255.

    Some rows at a time, whose int32 copies stay in the cache: of large images twice as fast.
    """
    behind = torch.tensor(background, dtype=torch.int32)
    rows = max(1, PIXELS_AT_ONCE // rgb.shape[1])
    composed = torch.empty(rgb.shape, dtype=torch.uint8)
    for into, colour, share in zip(composed.split(rows), rgb.split(rows), alpha.int().split(rows), strict=True):
        into.copy_((colour.int() * share + behind * (255 - share) + 127) // 255)
    return composed


def _look(frame: Any, video: OpenVideo, colour: Colour) -> Look:
    if frame.width * frame.height > MAX_PIXELS:
        raise VideoError(
            f"{video.path}: expected frames of at most {MAX_PIXELS} pixels, got {frame.width}×{frame.height}"
        )
    turn = (1, 0, 0, 1)
    if matrix := side_data(frame).get(Type.DISPLAYMATRIX):
        a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
        turn = (a, b, c, d)
    return Look(
        frame.height,
        frame.width,
        frame.format.name,
        int(frame.colorspace),
        int(frame.color_range),
        video.crop,
        turn,
        colour.matrix,
        colour.full_range,
        deep=colour.transfer is not None,
        alpha=colour.alpha,
    )
