"""Containers of every kind for tests: one clip of four quadrants, written with PyAV as its settings say.

The quadrants are red, green over blue, white, and a black bar between them moves a sixteenth of the width each frame:
`number_of` reads from a picture which frame it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from av.stream import Disposition

QUADRANTS = ((200, 30, 30), (30, 180, 30), (30, 30, 200), (220, 220, 220))
STEPS = 16

# Names of FFmpeg's numbers for tags.
MATRIX = {"bt709": 1, "unspecified": 2, "fcc": 4, "bt470bg": 5, "smpte170m": 6, "smpte240m": 7, "bt2020nc": 9}
TRANSFER = {"bt709": 1, "linear": 8, "srgb": 13, "pq": 16, "hlg": 18}
PRIMARIES = {"bt709": 1, "bt2020": 9, "display_p3": 12}
RANGE = {"limited": 1, "full": 2}


@dataclass(frozen=True)
class Container:
    """What is written. height, width: as stored. rate: frames/s. codec, pixels, options, format: FFmpeg's names.

    stamps: presentation times in units of 1/rate, in the order of display; None: 0, 1, …
    rotation, mirrored: the display matrix, in degrees anticlockwise, mirrored left to right after it is turned.
    aspect: width of a pixel by its height. matrix, full_range: of the YUV values, for RGB of BT.709's primaries.
    tagged: whether the file names both. transfer, primaries: tags alone, the values stay as they are.
    interlaced: odd and even lines are of two frames, half a step apart, flagged, top field first.
    alpha: of the left half, 0 to 255; the right half is opaque. first_frame: number of the first one.
    """

    height: int = 64
    width: int = 96
    frames: int = 8
    rate: Fraction = Fraction(24)
    codec: str = "libx264"
    pixels: str = "yuv420p"
    format: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    muxing: tuple[tuple[str, str], ...] = ()
    stamps: tuple[Fraction | int, ...] | None = None
    rotation: int = 0
    mirrored: bool = False
    aspect: Fraction = Fraction(1)
    matrix: str = "smpte170m"
    full_range: bool = False
    tagged: bool = True
    transfer: str | None = None
    primaries: str | None = None
    interlaced: bool = False
    alpha: int = 255
    first_frame: int = 0


# What makes encoders keep flat colours, and quickly. x265 in MP4 needs 3 frames or more: with fewer, PyAV may
# find no header when it writes the file.
EXACT = {
    "libx264": {"preset": "ultrafast", "crf": "8"},
    "libx265": {"preset": "ultrafast", "crf": "8", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libvpx": {"auto-alt-ref": "0", "crf": "4", "b": "4M", "deadline": "realtime"},
    "libvpx-vp9": {"crf": "8", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12", "crf": "10"},
    "libwebp": {"lossless": "1"},
    "libwebp_anim": {"lossless": "1"},
}
TICKS = 1000  # of the writer's clock, in a frame's time


def picture(height: int, width: int, number: int) -> np.ndarray:
    """uint8 [height, width, 3]: the quadrants, with the bar at its place in frame `number`."""
    image = np.zeros((height, width, 3), np.uint8)
    middle, centre = height // 2, width // 2
    image[:middle, :centre], image[:middle, centre:] = QUADRANTS[:2]
    image[middle:, :centre], image[middle:, centre:] = QUADRANTS[2:]
    left = number % STEPS * width // STEPS
    image[height * 7 // 16 : height * 9 // 16, left : left + width // STEPS] = 0
    return image


def number_of(image: Any) -> int:
    """Number modulo 16 of the frame that a picture [H, W, 3] of upright quadrants shows."""
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    row = pixels[height * 15 // 32 : height * 17 // 32].sum((0, 2))
    return int(np.argmin([row[width * step // STEPS : width * (step + 1) // STEPS].mean() for step in range(STEPS)]))


def write_container(path: Path, container: Container) -> Path:
    """Write one video stream, or, for a codec of pictures and one frame, a picture."""
    with av.open(str(path), "w", format=container.format, options=dict(container.muxing)) as file:
        _write_stream(file, container)
    return path


def write_streams(path: Path, containers: Sequence[Container], dispositions: Sequence[Disposition]) -> Path:
    """Several video streams in one file; their packets follow one another stream by stream."""
    with av.open(str(path), "w", format=containers[0].format) as file:
        streams = [_add_stream(file, container) for container in containers]
        for stream, disposition in zip(streams, dispositions, strict=True):
            stream.disposition = disposition
        for stream, container in zip(streams, containers, strict=True):
            _encode(file, stream, container)
    return path


def write_joined(path: Path, containers: Sequence[Container]) -> Path:
    """Whole files of one format put one behind the other, as transport streams and MPEG files may be."""
    data = b""
    for container in containers:
        data += write_container(path, container).read_bytes()
    path.write_bytes(data)
    return path


def write_with_cover(path: Path, container: Container | None) -> Path:
    """A video, or where it is None sound, in MP4 with a cover picture."""
    cover = write_container(path.with_suffix(".png"), Container(128, 128, 1, codec="png", pixels="rgb24")).read_bytes()
    path.with_suffix(".png").unlink()
    with av.open(str(path), "w") as file:
        art = file.add_stream("png", rate=1)
        art.width, art.height, art.pix_fmt = 128, 128, "rgb24"
        art.disposition = Disposition.attached_pic
        video = None if container is None else _add_stream(file, container)
        sound = file.add_stream("aac", rate=8000, layout="mono")
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = art, 0, 0, True
        file.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux([*sound.encode(frame), *sound.encode()])
        if video is not None and container is not None:
            _encode(file, video, container)
    return path


def _write_stream(file: Any, container: Container) -> None:
    _encode(file, _add_stream(file, container), container)


def _add_stream(file: Any, container: Container) -> Any:
    options = EXACT.get(container.codec, {}) | dict(container.options)
    if container.interlaced and container.codec == "libx264":
        options["flags"] = "+ildct+ilme"
    stream = file.add_stream(container.codec, rate=container.rate, options=options)
    stream.width, stream.height, stream.pix_fmt = container.width, container.height, container.pixels
    stream.codec_context.sample_aspect_ratio = container.aspect
    if container.codec in ("mpeg2video", "mpeg4", "mpeg1video", "mjpeg", "flv", "wmv2", "msmpeg4", "h263p"):
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        stream.codec_context.bit_rate = 4_000_000
    if container.codec in ("libx264", "libx265"):
        stream.codec_context.time_base = 1 / (container.rate * TICKS)
    if container.tagged and container.pixels.startswith(("yuv", "nv")):
        stream.codec_context.colorspace = MATRIX[container.matrix]
        stream.codec_context.color_range = RANGE["full" if container.full_range else "limited"]
    if container.transfer is not None:
        stream.codec_context.color_trc = TRANSFER[container.transfer]
    if container.primaries is not None:
        stream.codec_context.color_primaries = PRIMARIES[container.primaries]
    if container.rotation or container.mirrored:
        stream.set_display_rotation(container.rotation, hflip=container.mirrored)
    return stream


def _encode(file: Any, stream: Any, container: Container) -> None:
    for frame in _frames(container):
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def _frames(container: Container) -> list[Any]:
    """Frames in the wanted pixel format, with their stamps."""
    stamps = container.stamps or tuple(range(container.frames))
    graph = _conversion(container)
    frames = []
    for number, stamp in enumerate(stamps, container.first_frame):
        image = picture(container.height, container.width, number)
        if container.interlaced:
            image[1::2] = picture(container.height, container.width, number + 1)[1::2]
        alpha = np.full((*image.shape[:2], 1), 255, np.uint8)
        alpha[:, : container.width // 2] = container.alpha
        frame = av.VideoFrame.from_ndarray(np.concatenate([image, alpha], axis=2), format="rgba")
        frame.pts, frame.time_base = number, 1 / container.rate
        graph.push(frame)
        frame = graph.pull()
        per_frame = TICKS if container.codec in ("libx264", "libx265") else 1
        frame.pts, frame.time_base = round(stamp * per_frame), 1 / (container.rate * per_frame)
        frames.append(frame)
    return frames


def _conversion(container: Container) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{container.width}x{container.height}",
        pix_fmt="rgba",
        time_base=str(1 / container.rate),
        pixel_aspect=str(container.aspect),
    )
    matrix = "bt2020" if container.matrix == "bt2020nc" else container.matrix
    scale = f"out_color_matrix={matrix}:out_range={'full' if container.full_range else 'limited'}:"
    fields = f"field_mode={'tff' if container.interlaced else 'prog'}"
    tags = fields
    if container.pixels.startswith(("yuv", "nv")):
        tags += f":colorspace={container.matrix if container.tagged else 'unknown'}:range={_range(container)}"
    chain = [
        graph.add("scale", scale + "flags=accurate_rnd+full_chroma_int+bicubic"),
        graph.add("format", container.pixels),
        graph.add("setparams", tags),
        graph.add("buffersink"),
    ]
    graph.link_nodes(source, *chain).configure()
    return graph


def _range(container: Container) -> str:
    if not container.tagged:
        return "unknown"
    return "full" if container.full_range else "limited"


def still(codec: str, pixels: str, **settings: Any) -> Container:
    """A picture."""
    return replace(Container(frames=1, codec=codec, pixels=pixels, rate=Fraction(25)), **settings)
