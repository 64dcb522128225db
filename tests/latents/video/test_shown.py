"""What a player shows of a file is what is read: compared with the picture of the ffmpeg program."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

from k5kernels.latents.video import EVERY_FRAME, Reading, VideoError, read_video
from k5kernels.latents.video.shown import PIXELS_AT_ONCE
from tests.latents.video.containers import (
    MATRIX,
    QUADRANTS,
    Container,
    number_of,
    still,
    write_container,
    write_joined,
    write_streams,
    write_with_cover,
)
from tests.latents.video.ffmpeg_program import (
    SQUARE,
    assert_same_picture,
    ffmpeg,
    frames_of_ffmpeg,
    images,
    read_shown,
)

DEINTERLACED = f"bwdif=mode=send_frame:deint=interlaced,{SQUARE}"


def corners(image: torch.Tensor) -> list[list[int]]:
    """Colours in the corners, in the order of QUADRANTS."""
    return [image[y, x].tolist() for y in (4, -5) for x in (4, -5)]


def assert_colours(image: torch.Tensor, expected: Any = QUADRANTS) -> None:
    difference = np.abs(np.array(corners(image)) - np.array(expected)).max()
    assert difference <= 5, f"expected {expected}, got {corners(image)}"


@pytest.mark.parametrize("format", ["mp4", "mov"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_turned_and_mirrored(tmp_path: Path, rotation: int, mirrored: bool, format: str) -> None:
    path = write_container(tmp_path / f"v.{format}", Container(frames=3, rotation=rotation, mirrored=mirrored))
    frames = images(read_shown(path))
    height, width = (96, 64) if rotation % 180 else (64, 96)
    assert_same_picture(frames, frames_of_ffmpeg(path, height, width))
    turned = np.rot90(np.array(QUADRANTS).reshape(2, 2, 3), rotation // 90)
    assert_colours(frames[0], turned[:, :: -1 if mirrored else 1].reshape(4, 3))


@pytest.mark.parametrize(
    ("aspect", "rotation", "height", "width"),
    [
        (Fraction(64, 45), 0, 64, 137),
        (Fraction(1, 2), 0, 128, 96),
        (Fraction(16, 11), 90, 140, 64),
    ],
)
def test_pixels_that_are_not_square(tmp_path: Path, aspect: Fraction, rotation: int, height: int, width: int) -> None:
    path = write_container(tmp_path / "v.mp4", Container(frames=2, aspect=aspect, rotation=rotation))
    frames = images(read_shown(path))
    assert frames.shape == (2, height, width, 3)
    assert_same_picture(frames, frames_of_ffmpeg(path, height, width))
    square = read_shown(path, replace(EVERY_FRAME, square_pixels=True))
    assert images(square).shape[1:3] == ((96, 64) if rotation else (64, 96))


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [name for name in MATRIX if name != "unspecified"])
def test_colour_matrix_and_range(tmp_path: Path, matrix: str, full_range: bool) -> None:
    path = write_container(tmp_path / "v.mp4", Container(frames=2, matrix=matrix, full_range=full_range))
    frames = images(read_shown(path))
    assert_colours(frames[0])
    assert_same_picture(frames, frames_of_ffmpeg(path, 64, 96))


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [
        (576, 96, "smpte170m"),
        (578, 96, "bt709"),
        (64, 1278, "smpte170m"),
        (64, 1280, "bt709"),
    ],
)
def test_without_tags_size_decides_the_matrix(tmp_path: Path, height: int, width: int, matrix: str) -> None:
    path = write_container(tmp_path / "v.mp4", Container(height, width, 1, matrix=matrix, tagged=False))
    assert_colours(read_shown(path)[0].image)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("v.mp4", "libx264", "yuv420p10le"),
        ("v.mp4", "libx264", "yuv422p10le"),
        ("v.mkv", "ffv1", "yuv420p12le"),
        ("v.mkv", "ffv1", "yuv444p12le"),
    ],
)
def test_more_than_8_bits(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = write_container(tmp_path / name, Container(frames=2, codec=codec, pixels=pixels))
    frames = images(read_shown(path))
    assert_colours(frames[0])
    assert_same_picture(frames, frames_of_ffmpeg(path, 64, 96))


@pytest.mark.parametrize(("transfer", "name"), [("arib-std-b67", "HLG"), ("smpte2084", "PQ")])
def test_hdr_is_shown_as_zscale_shows_it(tmp_path: Path, transfer: str, name: str) -> None:
    write_container(tmp_path / "sdr.nut", Container(frames=2, codec="utvideo", pixels="gbrp"))
    there = f"zscale=tin=bt709:min=gbr:pin=bt709:t={transfer}:m=bt2020nc:p=bt2020:npl=203,format=yuv420p10le"
    back = f"zscale=tin={transfer}:min=bt2020nc:pin=bt2020:t=bt709:m=gbr:p=bt709:npl=203,format=gbrp"
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc"]
    quiet = ["-x265-params", "log-level=none:lossless=1", "-preset", "ultrafast"]
    ffmpeg("-i", tmp_path / "sdr.nut", "-vf", there, "-c:v", "libx265", *quiet, *tags, tmp_path / "hdr.mp4")
    shown = read_shown(tmp_path / "hdr.mp4")
    assert shown[0].colour == f"BT.2020 limited range, {name} in BT.2020 tone-mapped to BT.709"
    assert_same_picture(images(shown), frames_of_ffmpeg(tmp_path / "hdr.mp4", 64, 96, back))
    if name == "HLG":  # ten bits of PQ are too coarse for saturated colours to come back as they were
        assert_colours(shown[0].image)


def test_a_transfer_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.mp4", Container(frames=1, transfer="linear"))
    with pytest.raises(VideoError, match=r"expected colour that can be shown in BT\.709, got linear light"):
        read_shown(path)


@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("v.mov", Container(frames=2, codec="qtrle", pixels="argb", alpha=64)),
        ("v.png", still("png", "rgba", alpha=64)),
        ("v.webp", still("libwebp", "bgra", alpha=64)),
        ("v.webm", Container(frames=2, codec="libvpx", pixels="yuva420p", alpha=64)),
        ("v9.webm", Container(frames=2, codec="libvpx-vp9", pixels="yuva420p", alpha=64)),
    ],
)
def test_alpha_lies_over_the_background(tmp_path: Path, name: str, container: Container) -> None:
    path = write_container(tmp_path / name, container)
    for background in ((0, 0, 0), (255, 128, 0)):
        red, green, blue, white = QUADRANTS
        over = [tuple((64 * c + 191 * b) / 255 for c, b in zip(one, background, strict=True)) for one in (red, blue)]
        shown = read_shown(path, Reading(fps=None, background=background))
        assert_colours(shown[0].image, (over[0], green, over[1], white))


def test_alpha_of_a_large_picture_is_that_of_its_parts(tmp_path: Path) -> None:
    """Some rows are computed at a time, of this picture in six bands, the last of which is smaller."""
    height, width = 700, 512
    assert height * width > 5 * PIXELS_AT_ONCE
    rgba = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    path = tmp_path / "p.png"
    with av.open(str(path), "w", format="image2") as file:
        stream = file.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgba"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, "rgba")))
        file.mux(stream.encode())
    (shown,) = read_shown(path, Reading(fps=None, background=(255, 128, 0)))
    alpha = rgba[..., 3:].astype(np.float64) / 255
    expected = rgba[..., :3] * alpha + np.array([255, 128, 0]) * (1 - alpha)
    assert np.abs(shown.image.numpy() - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("crop", "height", "width"),
    [
        ("", 70, 90),  # a size that is no multiple of 16 is cut from one that is
        ("crop_left=8:crop_top=4:crop_right=2:crop_bottom=10", 50, 86),
    ],
)
def test_what_the_codec_cuts_off_is_not_shown(tmp_path: Path, crop: str, height: int, width: int) -> None:
    size = {"height": 70, "width": 90} if not crop else {}
    path = write_container(tmp_path / "v.mp4", Container(frames=2, **size))
    if crop:
        ffmpeg("-i", path, "-c", "copy", "-bsf:v", f"h264_metadata={crop}", tmp_path / "w.mp4")
        path = tmp_path / "w.mp4"
    shown = images(read_shown(path))
    assert shown.shape == (2, height, width, 3)
    assert_same_picture(shown, frames_of_ffmpeg(path, height, width))


STAMPED = {
    "missing": "setts=pts='if(eq(mod(N,3),1),NOPTS,PTS)'",
    "missing but of key frames": "setts=pts='if(N,NOPTS,PTS)'",
    "backward": "setts=dts=N:pts='(N+if(eq(mod(N,4),2),1,0)-if(eq(mod(N,4),3),1,0))/24/TB'",
    "far backward": "setts=dts=N:pts='if(eq(N,6),3,N)/24/TB'",
}


@pytest.mark.parametrize(
    ("format", "stamped"),
    # Transport streams whose stamps go back have a break there, which the ffmpeg program takes for their end.
    [
        pytest.param(format, STAMPED[name], id=f"{name}-{format}")
        for name in STAMPED
        for format in ("nut", "mkv", "ts")
        if format != "ts" or name.startswith("missing")
    ],
)
def test_missing_and_backward_stamps(tmp_path: Path, stamped: str, format: str) -> None:
    write_container(tmp_path / "v.mp4", Container(frames=13))
    path = tmp_path / f"w.{format}"
    ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", "-bsf:v", stamped, path)
    numbers = [number_of(one.image) for one in read_shown(path, Reading(fps=Fraction(24)))]
    assert numbers == [number_of(image) for image in frames_of_ffmpeg(path, 64, 96, "fps=24")]


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.mpg", "mpeg2video")])
def test_interlaced_lines_are_taken_apart(tmp_path: Path, name: str, codec: str) -> None:
    path = write_container(tmp_path / name, Container(codec=codec, rate=Fraction(25), interlaced=True))
    frames = images(read_shown(path))
    assert_same_picture(frames, frames_of_ffmpeg(path, 64, 96, DEINTERLACED))
    woven = frames_of_ffmpeg(path, 64, 96)
    with pytest.raises(AssertionError, match="means of regions differ"):
        assert_same_picture(frames[4:, 24:40], woven[4:, 24:40])


STAMPS = {
    "even": tuple(range(12)),
    "late start": tuple(range(100, 112)),
    "variable": (0, Fraction(2, 5), Fraction(4, 5), Fraction(6, 5), 4, 8, 9, Fraction(21, 2), 12, 15, 16, 17),
    "two at once": (0, 1, 2, 3, Fraction(3001, 1000), 5, 6, 7, 8, 9, 10, 11),
}


@pytest.mark.parametrize("fps", [12, 24, 60])
@pytest.mark.parametrize("format", ["mp4", "mkv"])
@pytest.mark.parametrize("stamps", STAMPS.values(), ids=STAMPS)
def test_frames_are_resampled_by_their_stamps(
    tmp_path: Path, stamps: tuple[Fraction | int, ...], format: str, fps: int
) -> None:
    path = write_container(tmp_path / f"v.{format}", Container(stamps=stamps))
    shown = read_shown(path, Reading(fps=Fraction(fps)))
    expected = frames_of_ffmpeg(path, 64, 96, f"fps={fps}")
    numbers = [number_of(one.image) for one in shown]
    assert numbers == [number_of(image) for image in expected]
    assert [one.end - one.start for one in shown] == [Fraction(1, fps)] * len(shown)
    assert all(before.end == after.start for before, after in pairwise(shown))


@pytest.mark.parametrize("format", ["mp4", "mkv"])
def test_a_slide_show_holds_every_slide_until_the_next(tmp_path: Path, format: str) -> None:
    slides = tuple(24 * second for second in (0, 45, 90, 100, 220, 222))
    path = write_container(tmp_path / f"v.{format}", Container(stamps=slides))
    shown = read_shown(path, Reading(fps=Fraction(1)))
    expected = frames_of_ffmpeg(path, 64, 96, "fps=1")
    assert [number_of(one.image) for one in shown] == [number_of(image) for image in expected]
    assert {one.part for one in shown} == {0}
    assert len(shown) >= 222
    every = read_shown(path)
    assert [one.start for one in every] == [0, 45, 90, 100, 220, 222]
    assert {one.part for one in every} == {0}


@pytest.mark.parametrize("rate", [12, 24, 60, 120])
def test_one_motion_at_any_rate_gives_the_same_clip(tmp_path: Path, rate: int) -> None:
    path = write_container(tmp_path / "v.mp4", Container(frames=rate // 2, rate=Fraction(rate)))
    assert len(read_shown(path, Reading(fps=Fraction(24)))) == 12
    assert len(read_shown(path)) == rate // 2


def test_the_default_stream_is_read(tmp_path: Path) -> None:
    containers = [Container(64, 96, 3), Container(128, 128, 3)]
    path = write_streams(tmp_path / "v.mkv", containers, [Disposition(0), Disposition.default])
    assert read_shown(path)[0].image.shape == (128, 128, 3)
    path = write_streams(tmp_path / "w.mkv", containers[::-1], [Disposition(0), Disposition.default])
    assert read_shown(path)[0].image.shape == (64, 96, 3)


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    assert read_shown(write_with_cover(tmp_path / "v.mp4", Container(frames=3)))[0].image.shape == (64, 96, 3)
    with pytest.raises(VideoError, match="expected a video, found cover art and no video stream"):
        read_shown(write_with_cover(tmp_path / "song.mp4", None))


@pytest.mark.parametrize("format", ["ts", "m2ts"])
def test_joined_transport_streams_are_parts_without_a_lost_frame(tmp_path: Path, format: str) -> None:
    parts = [Container(first_frame=0), Container(first_frame=5, frames=7), Container(96, 64, 6, first_frame=2)]
    shown = read_shown(write_joined(tmp_path / f"v.{format}", parts))
    assert [(one.part, number_of(one.image)) for one in shown] == [
        (number, part.first_frame + frame) for number, part in enumerate(parts) for frame in range(part.frames)
    ]
    assert all(one.start < one.end for one in shown)
    assert all(before.end <= after.start for before, after in pairwise(shown))


VIDEOS = {
    "v.avi": Container(codec="mpeg4"),
    "v.webm": Container(codec="libvpx"),
    "v9.webm": Container(codec="libvpx-vp9"),
    "v.wmv": Container(codec="wmv2"),
    "v.flv": Container(codec="flv"),
    "v.3gp": Container(codec="mpeg4"),
    "v.ogv": Container(codec="libvpx", format="ogg"),
    "v.mxf": Container(codec="mpeg2video", rate=Fraction(25)),
    "v.mpg": Container(codec="mpeg2video", rate=Fraction(25)),
    "v.m2ts": Container(),
    "v.ts": Container(codec="libx265"),
    "v.h264": Container(format="h264"),
    "v.y4m": Container(codec="wrapped_avframe", tagged=False),
    "v.gif": Container(codec="gif", pixels="bgr8"),
    "v.apng": Container(codec="apng", pixels="rgba"),
    "v.mov": Container(codec="prores_ks", pixels="yuv422p10le"),
    "v.mkv": Container(codec="ffv1"),
    "v.nut": Container(codec="utvideo", pixels="gbrp"),
    "mjpeg.avi": Container(codec="mjpeg", pixels="yuvj420p", full_range=True),
    "444.mp4": Container(pixels="yuv444p"),
}
PICTURES = {
    "p.png": still("png", "rgb24"),
    "p.jpg": still("mjpeg", "yuvj420p", full_range=True),
    "p.webp": still("libwebp", "bgra"),
    "p.bmp": still("bmp", "bgr24"),
    "p.tif": still("tiff", "rgb24"),
    "p.gif": still("gif", "bgr8"),
    "grey.png": still("png", "gray"),
    "16.png": still("png", "rgb48be"),
    "p.ico": still("bmp", "bgra", format="ico"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", [*VIDEOS, *PICTURES])
def test_a_format_is_known_by_its_content(tmp_path: Path, name: str, named: bool) -> None:
    container = (VIDEOS | PICTURES)[name]
    path = write_container(tmp_path / name, container)
    expected = frames_of_ffmpeg(path, 64, 96)
    if not named:
        path = path.rename(tmp_path / "v.txt")
    shown = read_shown(path)
    assert [number_of(one.image) for one in shown] == list(range(container.frames))
    assert [one.still for one in shown] == [name in PICTURES] * container.frames
    assert_same_picture(images(shown), expected)


def test_animated_webp_is_refused_by_name(tmp_path: Path) -> None:
    path = write_container(tmp_path / "v.webp", Container(codec="libwebp_anim", pixels="bgra"))
    with pytest.raises(VideoError, match="animated WebP"):
        read_video(path, 64, 96)
