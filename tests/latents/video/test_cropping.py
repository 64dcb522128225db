"""What a container says of a frame's shape (sides cut off, turns, pixels that are not square) is what is read."""

import struct
from fractions import Fraction
from pathlib import Path

import pytest

from k5kernels.latents.video import EVERY_FRAME, VideoError, read_clips
from k5kernels.latents.video.container import open_video
from k5kernels.latents.video.cropping import Crop
from k5kernels.latents.video.filters import Look, Renderer
from tests.latents.video.containers import Container, still, write_container
from tests.latents.video.ffmpeg_program import assert_same_picture, ffmpeg, frames_of_ffmpeg, images, read_shown

CROP = Crop(top=10, bottom=6, left=4, right=12)
ODD = Crop(top=9, bottom=4, left=3, right=12)
HEIGHT, WIDTH = 64, 96  # of a frame as it is stored
WAY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")


def cut_off(path: Path, crop: Crop, track: tuple[int, int] | None = None, aspect: bool = True) -> Path:
    """The MP4 or MOV with this `clap`. track: (height, width) that the track says it has. aspect: whether it keeps its
    `pasp`."""
    data = bytearray(path.read_bytes())
    height, width = crop.inside(HEIGHT, WIDTH)
    right, down = crop.left - crop.right, crop.top - crop.bottom
    clap = struct.pack(">I4sIIIIiIiI", 40, b"clap", width, 1, height, 1, right, 2, down, 2)
    start, parents = 0, []
    for name in WAY:
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
        parents.append(start)
        start += 8
    parents.append(start + 8)  # the description of the frames, behind their count
    end = parents[-1] + int.from_bytes(data[parents[-1] : parents[-1] + 4], "big")
    for parent in parents:
        data[parent : parent + 4] = (int.from_bytes(data[parent : parent + 4], "big") + len(clap)).to_bytes(4, "big")
    if not aspect:
        said = data.index(b"pasp")
        data[said : said + 4] = b"free"
    if track is not None:
        header = data.index(b"tkhd") - 4
        last = header + int.from_bytes(data[header : header + 4], "big")
        data[last - 8 : last] = struct.pack(">II", track[1] << 16, track[0] << 16)
    data[end:end] = clap
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_what_the_container_cuts_off_is_not_shown(tmp_path: Path, name: str, rotation: int) -> None:
    path = cut_off(write_container(tmp_path / "v.mp4", Container(frames=2, rotation=rotation)), CROP)
    if name == "v.mkv":
        ffmpeg("-i", path, "-c", "copy", tmp_path / name)
    height, width = (80, 48) if rotation else (48, 80)
    shown = images(read_shown(tmp_path / name))
    assert shown.shape == (2, height, width, 3)
    assert_same_picture(shown, frames_of_ffmpeg(tmp_path / name, height, width))


@pytest.mark.parametrize("codec", ["libx264", "qtrle", "png"])
def test_it_is_cut_off_to_the_pixel_whatever_the_codec(tmp_path: Path, codec: str) -> None:
    """Matroska holds one of these codecs, MOV all."""
    pixels = {"libx264": "yuv420p", "qtrle": "argb", "png": "rgba"}[codec]
    path = write_container(tmp_path / "v.mov", Container(frames=2, codec=codec, pixels=pixels))
    whole = images(read_shown(path))
    shown = images(read_shown(cut_off(path, ODD)))
    assert shown.equal(whole[:, 9:-4, 3:-12])


@pytest.mark.parametrize(
    ("track", "aspect", "width"),
    [
        ((48, 80), False, 80),  # the track's size is that of what is shown: its pixels are square
        ((48, 80), True, 107),
        ((64, 96), True, 107),
    ],
)
def test_pixels_of_what_is_left_are_as_wide_as_the_file_says(
    tmp_path: Path, track: tuple[int, int], aspect: bool, width: int
) -> None:
    container = Container(frames=2, aspect=Fraction(4, 3) if aspect else Fraction(1))
    path = cut_off(write_container(tmp_path / "v.mp4", container), CROP, track, aspect)
    assert images(read_shown(path)).shape == (2, 48, width, 3)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [90, 180])
def test_matroska_turns_and_stretches_as_the_mp4_it_came_from(tmp_path: Path, rotation: int, mirrored: bool) -> None:
    container = Container(frames=2, rotation=rotation, mirrored=mirrored, aspect=Fraction(4, 3))
    path = write_container(tmp_path / "v.mp4", container)
    ffmpeg("-i", path, "-c", "copy", tmp_path / "v.mkv")
    shown = images(read_shown(tmp_path / "v.mkv"))
    assert shown.shape[1:3] == ((128, 64) if rotation == 90 else (64, 128))
    assert shown.equal(images(read_shown(path)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int) -> None:
    path = write_container(tmp_path / "p.jpg", still("mjpeg", "yuvj420p", full_range=True))
    entry = struct.pack(">HHHIHH", 1, 0x112, 3, 1, orientation, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entry + bytes(4)
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    shown = images(read_shown(path))
    height, width = (64, 96) if orientation < 5 else (96, 64)
    assert_same_picture(shown, frames_of_ffmpeg(path, height, width))


def test_a_clip_says_which_size_a_player_shows(tmp_path: Path) -> None:
    path = cut_off(write_container(tmp_path / "v.mp4", Container(frames=5)), CROP)
    (clip,) = read_clips(path, ((64, 96),), 5)
    assert (clip.shown_height, clip.shown_width) == (48, 80)


def test_where_nothing_is_cut_off_nothing_is_known_of_a_crop(tmp_path: Path) -> None:
    for name in ("v.mp4", "v.mkv", "v.ts"):
        with open_video(write_container(tmp_path / name, Container(frames=3))) as video:
            assert (video.crop, bool(video.crop)) == (Crop(), False)


def test_a_crop_of_more_than_a_frame_is_refused() -> None:
    """As of a stream whose frames become smaller on the way."""
    look = Look(16, 32, "rgb24", 0, 0, Crop(bottom=16), (1, 0, 0, 1), None, None, deep=False, alpha=False)
    with pytest.raises(VideoError, match=r"v\.mp4: expected a crop that leaves some of 32×16 pixels, got Crop"):
        Renderer("v.mp4", look, Fraction(1, 24), EVERY_FRAME.fps, None)
