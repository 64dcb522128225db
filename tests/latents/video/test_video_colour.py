"""What a frame's tags say of its colour, and which are refused by name."""

from types import SimpleNamespace
from typing import Any

import av
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc

from k5kernels.latents.video import EVERY_FRAME, Reading, VideoError
from k5kernels.latents.video.colour import MATRICES, UNSUPPORTED_MATRICES, UNSUPPORTED_TRANSFERS, Colour, colour_of


def colour(
    pixels: str = "yuv420p", width: int = 64, height: int = 64, codec: str = "h264", picture: bool = False, **tags: Any
) -> Colour:
    frame = av.VideoFrame(width, height, pixels)
    reading = tags.pop("reading", EVERY_FRAME)
    for name, value in tags.items():
        setattr(frame, name, value)
    video: Any = SimpleNamespace(path="v.mp4", decoder=SimpleNamespace(name=codec), may_be_picture=picture)
    return colour_of(frame, video, reading)


@pytest.mark.parametrize("number", MATRICES)
def test_a_tagged_matrix_is_taken(number: int) -> None:
    name, ours = MATRICES[number]
    found = colour(colorspace=number)
    assert (found.matrix, found.full_range, found.words) == (name, False, f"{ours} limited range")


@pytest.mark.parametrize("number", UNSUPPORTED_MATRICES)
def test_a_matrix_that_cannot_be_converted_is_named(number: int) -> None:
    with pytest.raises(
        VideoError, match=r"v\.mp4: expected colour that can be shown in BT\.709, got the colour matrix"
    ):
        colour(colorspace=number)


@pytest.mark.parametrize(
    ("sizes", "settings", "matrix"),
    [
        ((720, 576), {}, "smpte170m"),
        ((720, 577), {}, "bt709"),
        ((1279, 576), {}, "smpte170m"),
        ((1280, 64), {}, "bt709"),
        ((1920, 1080), {"codec": "mjpeg"}, "smpte170m"),
        ((1920, 1080), {"picture": True}, "smpte170m"),
        ((1920, 1080), {"reading": Reading(untagged_matrix="bt601")}, "smpte170m"),
        ((64, 64), {"reading": Reading(untagged_matrix="bt709")}, "bt709"),
    ],
)
def test_an_untagged_matrix_is_assumed_as_players_do(sizes: tuple[int, int], settings: Any, matrix: str) -> None:
    found = colour(width=sizes[0], height=sizes[1], **settings)
    assert found.matrix == matrix
    assert "(assumed)" in found.words


@pytest.mark.parametrize("pixels", ["rgb24", "bgra", "pal8", "gray", "gray16le", "ya8"])
def test_rgb_and_grey_have_no_matrix(pixels: str) -> None:
    found = colour(pixels)
    assert (found.matrix, found.full_range) == (None, None)
    assert found.alpha == (pixels in ("bgra", "pal8", "ya8"))
    assert ("alpha over #000000" in found.words) == found.alpha


@pytest.mark.parametrize(("pixels", "tags"), [("yuvj420p", {}), ("yuv420p", {"color_range": ColorRange.JPEG})])
def test_full_range_is_said_by_the_tag_or_by_the_format(pixels: str, tags: Any) -> None:
    assert colour(pixels, **tags).full_range is True
    assert "full range" in colour(pixels, **tags).words


@pytest.mark.parametrize("transfer", UNSUPPORTED_TRANSFERS)
def test_a_transfer_that_cannot_be_converted_is_named(transfer: Any) -> None:
    with pytest.raises(VideoError, match=f"got {UNSUPPORTED_TRANSFERS[transfer]}; convert it first"):
        colour(color_trc=transfer)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, (None, None)),
        ({"color_primaries": ColorPrimaries.BT709}, (None, None)),
        ({"color_primaries": ColorPrimaries.BT2020}, ("BT.709", "BT.2020")),
        ({"color_primaries": ColorPrimaries.SMPTE432, "color_trc": ColorTrc.IEC61966_2_1}, ("sRGB", "Display P3")),
        ({"color_trc": ColorTrc.SMPTE2084}, ("PQ", "BT.2020")),
        ({"color_trc": ColorTrc.SMPTE2084, "color_primaries": ColorPrimaries.BT709}, ("PQ", "BT.709")),
        ({"color_trc": ColorTrc.ARIB_STD_B67, "color_primaries": ColorPrimaries.SMPTE431}, ("HLG", "DCI-P3")),
    ],
)
def test_hdr_and_wide_gamuts_are_converted_and_the_rest_stays(
    tags: Any, expected: tuple[str | None, str | None]
) -> None:
    found = colour(**tags)
    assert (found.transfer, found.primaries) == expected
