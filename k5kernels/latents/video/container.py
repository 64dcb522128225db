"""A video file opened: what is in it is found by its content, and the decoder's best stream is taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
from av.codec.context import Flags as CodecFlags
from av.container.core import Flags
from av.stream import Disposition

from k5kernels.latents.video.cropping import Crop, crop_of
from k5kernels.latents.video.errors import VideoError, translated

# Frame threads report damage one packet later each, so what is found of a damaged file depends on their number: it is
# the same on every machine.
DECODER_THREADS = 4
BUFFER_BYTES = 1 << 16
# A rate beyond this is a mistake of the file's.
MAX_RATE = 1000
DEFAULT_RATE = Fraction(25)
PICTURE_FORMATS = ("gif", "apng", "webp", "image2", "ico")
PICTURE_BRANDS = ("avif", "avis", "mif1", "msf1", "heic", "heix")
OPTIONS = {
    # No other file is opened on behalf of this one: playlists and references stay unread.
    "protocol_whitelist": "none",
}


@dataclass(frozen=True)
class OpenVideo:
    """An open file. container, stream, decoder: PyAV's. rate: frames/s the file announces, 25 where it does not.

    sample_aspect: width of a pixel by its height where the container says so; None leaves it to each frame.
    crop: what the container cuts off every frame.
    """

    path: str
    container: Any
    stream: Any
    decoder: Any
    rate: Fraction
    sample_aspect: Fraction | None
    crop: Crop

    @property
    def may_be_picture(self) -> bool:
        """Whether a single frame in this format is a still picture rather than a short video."""
        name = self.container.format.name
        brand = self.container.metadata.get("major_brand", "").strip()
        return name.endswith("_pipe") or name in PICTURE_FORMATS or brand in PICTURE_BRANDS

    @property
    def may_be_joined(self) -> bool:
        """Whether time stamps of this format may start anew on the way, as in joined transport streams."""
        return bool(self.container.format.flags & av.format.Flags.ts_discont.value)

    @property
    def announced_seconds(self) -> Fraction:
        """Duration that the file's header announces; 0 where it does not say."""
        duration = (self.stream.duration or 0) * Fraction(self.stream.time_base or 0)
        return max(duration or Fraction(self.container.duration or 0, 1_000_000), Fraction(0))

    def announced_frames(self, fps: Fraction | None) -> int:
        """Frames that the file's header announces, at `fps` or (None) as they are; 0 where it does not say."""
        if fps is None:
            return self.stream.frames or round(self.announced_seconds * self.rate)
        return round(self.announced_seconds * fps)


class _Bytes:
    """A file without its name: FFmpeg sees the content alone, and takes no part of a name for a pattern or protocol."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def open_video(path: str | Path) -> Iterator[OpenVideo]:
    """The file, open until the block ends; FFmpeg's errors inside the block are translated.

    Raises VideoError where it is no file, holds no video stream that can be decoded, or only pictures that belong to
    something else (cover art, tiles of a picture); OSError where the system does not let it be read.
    """
    if Path(path).exists() and not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no file but a pipe or a device"
        raise VideoError(f"{path}: expected a video file, found {found}")
    with (
        translated(path),
        open(path, "rb") as file,
        av.open(_Bytes(file), "r", options=OPTIONS, metadata_errors="replace", buffer_size=BUFFER_BYTES) as container,
    ):
        # PyAV asks for stamps to be made up where a container has none (AVI): wrong ones, where frames are reordered.
        container.flags &= ~Flags.gen_pts.value  # type: ignore[operator]  # an int, not what the stubs say
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            found = "no video stream" if stream is None else "cover art and no video stream"
            raise VideoError(f"{path}: expected a video, found {found}")
        if stream.disposition & Disposition.dependent:
            raise VideoError(f"{path}: expected a picture in one piece, found tiles; convert it to PNG or JPEG first")
        if stream.codec_context is None:
            raise VideoError(f"{path}: expected a codec that FFmpeg decodes here, found another")
        if container.format.name == "webp_pipe" and not stream.width:
            found = "found an animated WebP, which FFmpeg does not decode here; convert it to GIF or MP4 first"
            raise VideoError(f"{path}: expected a video or a still picture, {found}")
        if not stream.width or not stream.height:
            raise VideoError(f"{path}: expected a video, found a stream without a frame size")
        rate = stream.average_rate or stream.guessed_rate
        rate = Fraction(rate) if rate and 0 < rate <= MAX_RATE else DEFAULT_RATE
        crop = crop_of(container, stream)
        yield OpenVideo(str(path), container, stream, _decoder(stream), rate, _sample_aspect(stream, crop), crop)


def _sample_aspect(stream: Any, crop: Crop) -> Fraction | None:
    """What the container says goes before what the codec says of each frame."""
    said = stream.sample_aspect_ratio
    if not said or said == stream.codec_context.sample_aspect_ratio:
        return None
    # Where an MP4 does not say it, FFmpeg takes the size of the track by that of the whole frame, also where the track
    # has the size of what is left of the frame.
    height, width = crop.inside(stream.height, stream.width)
    return Fraction(1) if crop and said == Fraction(stream.height * width, stream.width * height) else Fraction(said)


def _decoder(stream: Any) -> Any:
    """The stream's decoder; the default ones for VP8 and VP9 leave out the alpha that others decode."""
    decoder = stream.codec_context
    if decoder.name in ("vp8", "vp9") and stream.metadata.get("alpha_mode") == "1":
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name]
        decoder = av.CodecContext.create(name, "r")
    # What the codec cuts off at the left is cut off to the pixel, not to where memory is aligned.
    decoder.flags |= CodecFlags.unaligned
    decoder.thread_type = "AUTO"
    decoder.thread_count = DECODER_THREADS
    return decoder
