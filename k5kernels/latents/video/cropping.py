"""What a container says is cut off every frame: `clap` of MP4 and MOV, PixelCrop of Matroska.

FFmpeg reads it and leaves it to programs, and PyAV does not pass it on. It also stands in the header that FFmpeg writes
for a file of the same stream, and is read there.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av

FORMATS = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2")
# IDs of Matroska's elements: the way to a track's picture, and what is cut off it.
SEGMENT, TRACKS, TRACK, VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0xE0
SIDES = {0x54BB: "top", 0x54AA: "bottom", 0x54CC: "left", 0x54DD: "right"}
# The way of boxes to a MOV's description of frames, and what stands in the last two before the next boxes.
WAY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
COUNT_BYTES, DESCRIPTION_BYTES = 8, 78


@dataclass(frozen=True)
class Crop:
    """How many pixels are cut off at each side of a frame as the decoder gives it, before it is turned."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __bool__(self) -> bool:
        return self != Crop()

    def inside(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what is left."""
        return height - self.top - self.bottom, width - self.left - self.right


def crop_of(container: Any, stream: Any) -> Crop:
    if container.format.name not in FORMATS:
        return Crop()
    # Of two formats, as neither holds every codec.
    if (header := _header(stream, "matroska")) is not None:
        return _matroska_crop(header)
    if (header := _header(stream, "mov", movflags="empty_moov")) is not None:
        return _mov_crop(header, stream.height, stream.width)
    return Crop()


def _header(stream: Any, format: str, **options: str) -> bytes | None:
    """That of a file of the stream; None where the format does not hold its codec."""
    written = io.BytesIO()
    try:
        with av.open(written, "w", format=format, options=options) as file:
            file.add_stream_from_template(stream, opaque=True)
            file.start_encoding()
    except (av.FFmpegError, ValueError):
        return None
    return written.getvalue()


def _matroska_crop(header: bytes) -> Crop:
    pieces = [header]
    for wanted in (SEGMENT, TRACKS, TRACK, VIDEO):
        pieces = [content for piece in pieces for number, content in _elements(piece) if number == wanted]
    sides = [(SIDES[number], content) for piece in pieces for number, content in _elements(piece) if number in SIDES]
    return Crop(**{side: int.from_bytes(content, "big") for side, content in sides})


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(ID, content) of the elements of EBML that stand in these bytes."""
    while data:
        length = _length(data)
        number, data = int.from_bytes(data[:length], "big"), data[length:]
        length = _length(data)
        unknown = (1 << 7 * length) - 1  # the size of what is not ended yet
        size, data = int.from_bytes(data[:length], "big") & unknown, data[length:]
        yield number, data if size == unknown else data[:size]
        data = b"" if size == unknown else data[size:]


def _length(data: bytes) -> int:
    """Bytes of a number of EBML: one more than its first byte has leading zeros."""
    return 9 - data[0].bit_length()


def _mov_crop(header: bytes, height: int, width: int) -> Crop:
    for name in WAY:
        header = next((content for kind, content in _boxes(header) if kind == name), b"")
    _, description = next(_boxes(header[COUNT_BYTES:]), (b"", b""))
    for kind, content in _boxes(description[DESCRIPTION_BYTES:]):
        if kind == b"clap":
            # Fractions: the sides of what is left, and how far its centre lies right of and below the frame's.
            wide, by_w, high, by_h, right, by_r, down, by_d = struct.unpack(">IIIIiIiI", content[:32])
            across, along = wide // by_w, high // by_h
            left, top = round((width - across) / 2 + right / by_r), round((height - along) / 2 + down / by_d)
            return Crop(top, height - along - top, left, width - across - left)
    return Crop()


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the boxes that stand in these bytes."""
    while len(data) >= 8:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[max(size, 8) :]
