"""Packets to frames with a time and a duration each; damage and breaks on the way.

Joined transport streams (files put one after the other, a recording that was interrupted) start anew on the way. The
decoder is emptied there and goes on at the next key frame, so that no frame refers to one of another part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av

from k5kernels.latents.video.container import OpenVideo
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.timeline import GAP_SECONDS, Timeline

MICROSECOND = Fraction(1, 1_000_000)
# Where a part was cut off, its last packets are marked as damaged: a break follows this soon.
DAMAGED_BEFORE_BREAK = 3


@dataclass(frozen=True)
class Decoded:
    """A frame of PyAV's. start, end: when it is shown and until when [s], from the start of the file.

    begins_part: a break lies before it. ends_stream: no frame follows it.
    """

    frame: Any
    start: Fraction
    end: Fraction
    begins_part: bool
    ends_stream: bool


def decoded_frames(video: OpenVideo) -> Iterator[Decoded]:
    """The frames in the order in which they are shown. Raises VideoError where data is damaged or missing."""
    unit = Fraction(video.stream.time_base)
    origin = round((video.container.start_time or 0) * MICROSECOND / unit)
    # A damaged file announces a frame in a million years, which would be resampled to frames without end.
    timeline = Timeline(min(1 / video.rate, GAP_SECONDS), video.may_be_joined, video.announced_seconds)
    before: Decoded | None = None
    for frame, new_part in _frames(video, timeline):
        stamp = frame.dts if frame.pts is None else frame.pts
        start, begins_part = timeline.place(_seconds(stamp, origin, unit), new_part)
        duration = frame.duration * unit if (frame.duration or 0) > 0 else 1 / video.rate
        if before is not None:
            end = before.end if begins_part else start
            yield Decoded(before.frame, before.start, end, before.begins_part, ends_stream=False)
        if not timeline.is_pause(start, start + duration):
            duration = min(duration, GAP_SECONDS)
        before = Decoded(frame, start, start + duration, begins_part, ends_stream=True)
    if before is not None:
        yield before


def _frames(video: OpenVideo, timeline: Timeline) -> Iterator[tuple[Any, bool]]:
    """(frame, whether the decoder started anew before it)."""
    decoder, count = video.decoder, 0
    begins_part, waits_for_key = False, video.may_be_joined
    for packet, ends_part in _packets(video, timeline):
        if packet is not None and waits_for_key and packet.size and not packet.is_keyframe:
            continue
        waits_for_key = False
        try:
            frames = decoder.decode(packet)
        except av.InvalidDataError:
            if not ends_part:
                raise
            # Cut off where the next part was put behind it.
            frames = []
        for frame in frames:
            if not frame.is_corrupt:
                count += 1
                yield frame, begins_part
                begins_part = False
            elif count and not begins_part and not ends_part:
                raise _damaged(video, count)
        if packet is None:
            decoder.flush_buffers()
            begins_part = waits_for_key = True


def _packets(video: OpenVideo, timeline: Timeline) -> Iterator[tuple[Any, bool]]:
    """(packet, whether a part ends with it) of the stream; after a part (None, True), which empties the decoder.

    A packet is marked as damaged where packets of the transport stream are missing after it. That is so in the middle
    of a recording, and also where another one follows: there a jump of the stamps comes soon, or a key frame in time.
    Raises VideoError for the former. A damaged packet is not decoded, for that raises an error or not by the number of
    threads.
    """
    unit = Fraction(video.stream.time_base)
    previous: Fraction | None = None
    doubtful: list[Any] = []
    count = 0
    for packet in video.container.demux(video.stream):
        stamp = _seconds(packet.pts if packet.dts is None else packet.dts, 0, unit)
        jumps = video.may_be_joined and timeline.is_jump(previous, stamp)
        if jumps or (doubtful and packet.is_keyframe):
            yield from ((one, jumps) for one in doubtful)
            doubtful.clear()
        if jumps:
            yield None, True
        previous = previous if stamp is None else stamp
        if packet.is_corrupt or doubtful:
            doubtful.append(packet)
        else:
            yield packet, False
            count += 1
        if doubtful and (not video.may_be_joined or not packet.size or len(doubtful) > DAMAGED_BEFORE_BREAK):
            raise _damaged(video, count)


def _seconds(stamp: int | None, origin: int, unit: Fraction) -> Fraction | None:
    return None if stamp is None else (stamp - origin) * unit


def _damaged(video: OpenVideo, count: int) -> VideoError:
    return VideoError(f"{video.path}: expected a whole video, found damaged or missing data after frame {count}")
