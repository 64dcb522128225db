"""What a frame's tags say of its colour, and what is done to show it in BT.709."""

from dataclasses import dataclass
from typing import Any

from av.sidedata.sidedata import Type
from av.video.format import VideoFormat
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc

from k5kernels.latents.video.container import OpenVideo
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.reading import Reading
from k5kernels.latents.video.side_data import side_data

# AVColorSpace -> (the filters' name, ours). 2 is unspecified; 0 (RGB) and 3 (reserved) say nothing of a YUV frame.
UNTAGGED = (0, 2, 3)
MATRICES = {
    1: ("bt709", "BT.709"),
    4: ("fcc", "FCC"),
    5: ("bt470bg", "BT.601"),
    6: ("smpte170m", "BT.601"),
    7: ("smpte240m", "SMPTE 240M"),
    9: ("bt2020nc", "BT.2020"),
}
ASSUMED = {"bt601": ("smpte170m", "BT.601"), "bt709": ("bt709", "BT.709")}
UNSUPPORTED_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived constant luminance",
    14: "ICtCp",
    15: "IPT-C2 (Dolby Vision)",
    16: "YCgCo-R, even addition",
    17: "YCgCo-R, odd addition",
}
# From these sides on, what is untagged is taken as high definition, as players do.
HD_WIDTH, HD_HEIGHT = 1280, 577
# BT.601 by definition, whatever the size.
ALWAYS_BT601 = ("vp8", "libvpx", "webp", "mjpeg", "mpeg1video")
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
UNSUPPORTED_TRANSFERS = {
    ColorTrc.LINEAR: "linear light",
    ColorTrc.LOG: "logarithmic",
    ColorTrc.LOG_SQRT: "logarithmic",
    ColorTrc.SMPTE428: "SMPTE 428",
}
WIDE_PRIMARIES = {
    ColorPrimaries.BT2020: "BT.2020",
    ColorPrimaries.SMPTE431: "DCI-P3",
    ColorPrimaries.SMPTE432: "Display P3",
}


@dataclass(frozen=True)
class Colour:
    """How frames are to be converted. matrix, full_range: in the filters' words; None: RGB, or as the frame says.

    transfer, primaries: as `tone_mapping` names them, where pixels need it; else None. alpha: whether there is some.
    words: what a person wants to know of it.
    """

    matrix: str | None
    full_range: bool | None
    transfer: str | None
    primaries: str | None
    alpha: bool
    words: str


def colour_of(frame: Any, video: OpenVideo, reading: Reading) -> Colour:
    """Raises VideoError for colour that cannot be converted, by name."""
    layout: VideoFormat = frame.format
    alpha = layout.has_palette or any(component.is_alpha for component in layout.components)
    matrix, matrix_name = _matrix(frame, video, reading)
    # FFmpeg's deprecated formats for full-range YUV have it in their names.
    full = frame.color_range == ColorRange.JPEG or layout.name.startswith("yuvj") if matrix else None
    transfer, primaries = _conversion(frame, video)
    words = [matrix_name + ("" if full is None else " full range" if full else " limited range")]
    if transfer in ("PQ", "HLG"):
        words.append(f"{transfer} in {primaries} tone-mapped to BT.709")
    elif primaries is not None:
        words.append(f"{primaries} primaries converted to BT.709")
    if alpha:
        words.append("alpha over #" + bytes(reading.background).hex())
    return Colour(matrix, full, transfer, primaries, alpha, ", ".join(words))


def _matrix(frame: Any, video: OpenVideo, reading: Reading) -> tuple[str | None, str]:
    """(the filters' name, ours) of the YUV matrix."""
    layout: VideoFormat = frame.format
    if layout.is_rgb or layout.has_palette or layout.name.startswith("xyz"):
        return None, "RGB"
    if layout.name.startswith(("gray", "ya", "mono")):
        return None, "grey"
    tag = int(frame.colorspace)
    if tag in MATRICES:
        return MATRICES[tag]
    if tag not in UNTAGGED:
        raise _unsupported(video, f"the colour matrix {UNSUPPORTED_MATRICES.get(tag, tag)}")
    if frame.color_trc not in HDR and Type.DOVI_RPU_BUFFER in side_data(frame):
        raise _unsupported(video, "Dolby Vision without a compatible base layer")
    assumed = "bt709" if frame.width >= HD_WIDTH or frame.height >= HD_HEIGHT else "bt601"
    if video.decoder.name in ALWAYS_BT601 or video.may_be_picture:
        assumed = "bt601"
    name, ours = ASSUMED[reading.untagged_matrix or assumed]
    return name, f"{ours} (assumed)"


def _conversion(frame: Any, video: OpenVideo) -> tuple[str | None, str | None]:
    """(transfer, primaries) for `tone_mapping.to_bt709`, None where pixels stay as they are."""
    if frame.color_trc in UNSUPPORTED_TRANSFERS:
        raise _unsupported(video, UNSUPPORTED_TRANSFERS[frame.color_trc])
    wide = WIDE_PRIMARIES.get(frame.color_primaries)
    if frame.color_trc in HDR:
        untagged = frame.color_primaries == ColorPrimaries.UNSPECIFIED
        return HDR[frame.color_trc], wide or ("BT.2020" if untagged else "BT.709")
    if wide is None:
        return None, None
    return "sRGB" if frame.color_trc == ColorTrc.IEC61966_2_1 else "BT.709", wide


def _unsupported(video: OpenVideo, found: str) -> VideoError:
    return VideoError(f"{video.path}: expected colour that can be shown in BT.709, got {found}; convert it first")
