"""FFmpeg's filters, through PyAV: bwdif, fps, scale, transpose and those around them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.filter

from k5kernels.latents.video.cropping import Crop
from k5kernels.latents.video.errors import VideoError

# Pixels of a frame; a file that asks for more is broken.
MAX_PIXELS = 1 << 27
MAX_STRETCH = 16.0


@dataclass(frozen=True)
class Look:
    """What stays the same while one chain of filters serves.

    format, colorspace, color_range: as FFmpeg numbers and names them. crop: what is cut off before the
    frame is turned. turn: a, b, c, d of the display matrix.
    matrix, full_range: the YUV matrix in the filters' words, None for frames without one.
    deep: 16 bits a channel are wanted, not 8. alpha: whether there is some.
    """

    height: int
    width: int
    format: str
    colorspace: int
    color_range: int
    crop: Crop
    turn: tuple[int, int, int, int]
    matrix: str | None
    full_range: bool | None
    deep: bool
    alpha: bool


class Deinterlacer:
    """Frames as they are until one is marked as interlaced; from then on through bwdif, which keeps unmarked ones."""

    def __init__(self, look: Look, unit: Fraction) -> None:
        self.look, self.unit = look, unit
        self.graph: Any = None

    def push(self, frame: Any) -> Iterator[Any]:
        if self.graph is None and frame.interlaced_frame and self.look.height >= 4 and self.look.width >= 3:
            # bwdif may ask for another format; what leaves has the former one again.
            filters = [("bwdif", "mode=send_frame:deint=interlaced"), ("format", self.look.format)]
            self.graph = _graph(self.look, self.unit, filters)
        if self.graph is None:
            yield frame
            return
        self.graph.push(frame)
        yield from self._pulled()

    def finish(self) -> Iterator[Any]:
        if self.graph is not None:
            self.graph.push(None)
            yield from self._pulled()

    def _pulled(self) -> Iterator[Any]:
        for frame in _pull(self.graph):
            # bwdif counts in half units, for fields.
            scale = frame.time_base / self.unit
            frame.pts, frame.duration = round(frame.pts * scale), round(frame.duration * scale)
            frame.time_base = self.unit
            yield frame


class Renderer:
    """Progressive frames to RGB, RGBA or their 16-bit forms, at `fps` where one is given (its pts count at `fps`).

    aspect: width of a pixel by its height; None takes each frame's own.
    """

    def __init__(self, path: str, look: Look, unit: Fraction, fps: Fraction | None, aspect: Fraction | None) -> None:
        self.path = path
        height, width = look.crop.inside(look.height, look.width)
        if min(height, width) < 1:
            raise VideoError(
                f"{path}: expected a crop that leaves some of {look.width}×{look.height} pixels, got {look.crop}"
            )
        self.pixels = height * width
        colours = f"color_primaries=unknown:color_trc=unknown:colorspace={look.matrix or 'auto'}"
        if look.full_range is not None:
            colours += f":range={'full' if look.full_range else 'limited'}"
        layout = {
            (False, False): "rgb24",
            (False, True): "rgba",
            (True, False): "rgb48le",
            (True, True): "rgba64le",
        }[look.deep, look.alpha]
        # How far pixels may be stretched: a frame at the limit is refused when it comes out.
        self.most = min(MAX_STRETCH, max(2.0, MAX_PIXELS / self.pixels))
        turning = _turning(look.turn)
        if aspect is not None and any(name == "transpose" for name, _ in turning):
            aspect = 1 / aspect
        ratio = f"clip({'sar' if aspect is None else float(aspect)},{1 / self.most},{self.most})"
        square = f"w='round(iw*max({ratio},1))':h='round(ih/min({ratio},1))':flags=bicubic+accurate_rnd:eval=frame"
        filters = [] if fps is None else [("fps", f"fps={fps}:round=near")]
        filters += [
            ("setparams", colours),
            ("scale", "flags=bilinear"),
            ("format", layout),
            # In RGB, where every pixel has its colour: a corner may lie between two pixels of a subsampled one.
            *([("crop", f"{width}:{height}:{look.crop.left}:{look.crop.top}")] if look.crop else []),
            *turning,
            # Last, because the filters after it would keep the size that was settled before the first frame.
            ("scale", square),
            ("format", layout),
        ]
        self.graph = _graph(look, unit, filters)

    def push(self, frame: Any) -> Iterator[Any]:
        self.graph.push(frame)
        yield from self._pulled()

    def finish(self) -> Iterator[Any]:
        self.graph.push(None)
        yield from self._pulled()

    def _pulled(self) -> Iterator[Any]:
        for frame in _pull(self.graph):
            if frame.width * frame.height > 0.99 * self.most * self.pixels:
                raise VideoError(f"{self.path}: expected pixels whose sides differ by less than {self.most:g} times")
            yield frame


def _turning(turn: tuple[int, int, int, int]) -> list[tuple[str, str]]:
    """The filters that turn and mirror by a display matrix: those of the ffmpeg program."""
    a, b, c, d = turn
    lengths = math.hypot(a, c), math.hypot(b, d)
    if 0 in lengths:
        return []  # a matrix that maps all pixels to a line says nothing
    degrees = round(math.degrees(math.atan2(b / lengths[1], a / lengths[0]))) % 360
    if abs(degrees - 90) < 1:
        return [("transpose", "cclock_flip" if c > 0 else "clock")]
    if abs(degrees - 180) < 1:
        return [(name, "") for name, mirrored in (("hflip", a < 0), ("vflip", d < 0)) if mirrored]
    if abs(degrees - 270) < 1:
        return [("transpose", "clock_flip" if c < 0 else "cclock")]
    if degrees:
        return [("rotate", f"{degrees}*PI/180")]
    return [("vflip", "")] if d < 0 else []


def _graph(look: Look, unit: Fraction, filters: list[tuple[str, str]]) -> Any:
    graph = av.filter.Graph()
    # The same on every machine, and the encoder is what takes the time.
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{look.width}x{look.height}",
        pix_fmt=look.format,
        time_base=str(unit),
        colorspace=str(look.colorspace),
        range=str(look.color_range),
    )
    chain = [graph.add(name, arguments or None) for name, arguments in filters]
    graph.link_nodes(source, *chain, graph.add("buffersink")).configure()
    return graph


def _pull(graph: Any) -> Iterator[Any]:
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
