"""Video files in and out: what comes back, and one clear line for every file that will not do."""

import math
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from k5kernels.latents.video import (
    BUCKETS,
    VideoError,
    decode,
    fit,
    nearest_bucket,
    probe,
    read_video,
    to_frames,
    to_model,
    write_video,
)

RATE = Fraction(30000, 1001)


def moving_gradient(frames: int, height: int, width: int) -> Tensor:
    """Smooth frames that differ from one another: uint8 [F, H, W, 3]."""
    y = torch.linspace(0, 120, height)[None, :, None, None].expand(frames, height, width, 1)
    x = torch.linspace(0, 200, width)[None, None, :, None].expand(frames, height, width, 1)
    t = torch.arange(frames)[:, None, None, None].expand(frames, height, width, 1) * 8.0
    return torch.cat([x, y + t, 255 - x], dim=-1).clamp(0, 255).round().to(torch.uint8)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "video.mp4", moving_gradient(12, 64, 96), RATE)
    return tmp_path / "video.mp4"


def remux(source: Path, target: Path, **options: str) -> None:
    """The same packets in another container, or in another order of the same one."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_what_is_written_reads_back(video: Path) -> None:
    frames, rate = read_video(video, 64, 96)
    assert frames.shape == (12, 64, 96, 3)
    assert frames.dtype == torch.uint8
    assert rate == RATE
    assert (frames.float() - moving_gradient(12, 64, 96).float()).abs().mean() < 3


def test_probe_tells_sides_rate_and_frames(video: Path) -> None:
    info = probe(video)
    assert (info.height, info.width, info.rate, info.frames) == (64, 96, RATE, 12)


def test_only_the_frames_asked_for_are_read(video: Path) -> None:
    frames, _ = read_video(video, 64, 96, max_frames=5)
    assert torch.equal(frames, read_video(video, 64, 96)[0][:5])
    with pytest.raises(ValueError, match="max_frames: expected at least 1, got 0"):
        read_video(video, 64, 96, max_frames=0)


def test_frames_are_decoded_one_by_one(video: Path) -> None:
    frames = decode(video, 32, 32)
    assert next(frames).shape == (32, 32, 3)
    assert sum(1 for _ in frames) == 11


def test_decoding_equals_fitting_the_whole(video: Path) -> None:
    whole = fit(read_video(video, 64, 96)[0], 32, 32)
    assert torch.equal(read_video(video, 32, 32)[0], whole)


def test_crop_is_centred() -> None:
    frames = torch.zeros(1, 40, 100, 3, dtype=torch.uint8)
    frames[:, :, 30:70] = 200
    assert (fit(frames, 20, 20) == 200).all()
    assert (fit(frames.transpose(1, 2), 20, 20) == 200).all()


def test_same_size_is_untouched() -> None:
    frames = moving_gradient(2, 24, 40)
    assert torch.equal(fit(frames, 24, 40), frames)


def test_model_range_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    video = to_model(frames)
    assert video.shape == (1, 3, 2, 16, 16)
    assert (float(video.min()), float(video.max())) == (-1.0, 1.0)
    assert torch.equal(to_frames(video), frames)
    assert torch.equal(to_frames(video * 3), to_frames((video * 3).clamp(-1, 1)))


@pytest.mark.parametrize(
    ("height", "width", "resolution", "bucket"),
    [
        (720, 1280, 512, (512, 768)),
        (1280, 720, 256, (384, 256)),
        (500, 480, 256, (256, 256)),
        (1, 9, 1024, (640, 1408)),
    ],
)
def test_nearest_bucket(height: int, width: int, resolution: int, bucket: tuple[int, int]) -> None:
    assert nearest_bucket(height, width, resolution) == bucket


def test_every_bucket_is_its_own_nearest() -> None:
    for resolution, sides in BUCKETS.items():
        assert [nearest_bucket(height, width, resolution) for height, width in sides] == list(sides)


def test_bucket_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"resolution: expected one of \[256, 512, 1024\], got 300"):
        nearest_bucket(10, 10, 300)
    with pytest.raises(ValueError, match="expected at least 1 pixel, got 0×10"):
        nearest_bucket(0, 10, 256)


def test_frames_may_change_their_size_on_the_way(tmp_path: Path) -> None:
    parts = []
    for number, (height, width) in enumerate([(64, 96), (96, 64)]):
        write_video(tmp_path / "part.mp4", moving_gradient(6, height, width), Fraction(25))
        remux(tmp_path / "part.mp4", tmp_path / f"{number}.h264")
        parts.append((tmp_path / f"{number}.h264").read_bytes())
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    assert read_video(tmp_path / "both.h264", 48, 48)[0].shape == (12, 48, 48, 3)


def test_odd_names_are_no_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("concat:a b%03d.mp4", moving_gradient(2, 16, 16), RATE)
    assert len(read_video("concat:a b%03d.mp4", 16, 16)[0]) == 2


def truncate(path: Path, part: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def make_missing(path: Path, video: Path) -> None:
    pass


def make_folder(path: Path, video: Path) -> None:
    path.mkdir()


def make_empty(path: Path, video: Path) -> None:
    path.touch()


def make_text(path: Path, video: Path) -> None:
    path.write_text("Not a video.\n" * 100)


def make_sound(path: Path, video: Path) -> None:
    write_sound(path)


def make_without_index(path: Path, video: Path) -> None:
    path.write_bytes(video.read_bytes())
    truncate(path, 0.7)


def make_cut(path: Path, video: Path) -> None:
    remux(video, path, movflags="faststart")
    truncate(path, 0.8)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.mp4", make_missing, "expected a video file, found no such file"),
        ("folder.mp4", make_folder, "expected a video file, found a folder"),
        ("empty.mp4", make_empty, "expected a readable video file"),
        ("text.mp4", make_text, "expected a readable video file"),
        ("text.txt", make_text, "expected a video, found no video stream"),
        ("sound.wav", make_sound, "expected a video, found no video stream"),
        ("half.mp4", make_without_index, "expected a readable video file|found no video stream"),
        ("cut.mp4", make_cut, "expected a whole video, found damaged or missing data after frame"),
    ],
)
def test_file_that_is_no_whole_video_is_refused_in_one_line(
    video: Path, tmp_path: Path, name: str, make: Callable[[Path, Path], None], message: str
) -> None:
    path = tmp_path / name
    make(path, video)
    with pytest.raises(VideoError, match=message) as caught:
        read_video(path, 64, 96)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_data_is_refused(video: Path, tmp_path: Path) -> None:
    remux(video, tmp_path / "video.mkv")
    data = bytearray((tmp_path / "video.mkv").read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    (tmp_path / "video.mkv").write_bytes(data)
    with pytest.raises(VideoError, match="expected a"):
        read_video(tmp_path / "video.mkv", 64, 96)


def test_source_is_enlarged_twice_at_most(video: Path) -> None:
    assert read_video(video, 128, 192, max_frames=1)[0].shape == (1, 128, 192, 3)
    with pytest.raises(VideoError, match="expected frames of at least 97×65 pixels for 194×130, got 96×64"):
        read_video(video, 130, 194)
    assert read_video(video, 256, 384, max_frames=1, max_upscale=math.inf)[0].shape == (1, 256, 384, 3)


def test_too_few_frames_are_counted(video: Path) -> None:
    assert len(read_video(video, 64, 96, min_frames=12)[0]) == 12
    with pytest.raises(VideoError, match="expected a video of at least 13 frames, decoded 12"):
        read_video(video, 64, 96, min_frames=13)


@pytest.mark.parametrize("frames", [1, 2])
def test_short_videos_are_whole_too(tmp_path: Path, frames: int) -> None:
    write_video(tmp_path / "short.mp4", moving_gradient(frames, 16, 16), RATE)
    assert len(read_video(tmp_path / "short.mp4", 16, 16)[0]) == frames


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 16, 16, 3), r"expected uint8 \[F, H, W, 3\], got torch.float32"),
        (torch.zeros(0, 16, 16, 3, dtype=torch.uint8), r"got torch.uint8 \[0, 16, 16, 3\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"got torch.uint8 \[2, 3, 16, 16\]"),
        (torch.zeros(2, 15, 16, 3, dtype=torch.uint8), r"expected even sides \(4:2:0 colour\), got \[15, 16\]"),
    ],
)
def test_frames_to_write_are_checked(tmp_path: Path, frames: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "video.mp4", frames, RATE)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"could not be written \(No such file or directory\)"):
        write_video(tmp_path / "nowhere" / "video.mp4", moving_gradient(2, 16, 16), RATE)


@contextmanager
def disk_of_4_kib() -> Iterator[None]:
    """Files cannot grow beyond 4 KiB: the error of a full disk, but for its number.

    Around the write alone: the test run's own output may be a file that is longer already.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    noise = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VideoError, match=r"video\.mp4: the video could not be written"), disk_of_4_kib():
        write_video(tmp_path / "video.mp4", noise, RATE)
    assert not list(tmp_path.iterdir())


def test_interrupted_write_keeps_the_former_file(video: Path) -> None:
    before = video.read_bytes()

    class Interrupted(Tensor):
        def cpu(self) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(video, moving_gradient(2, 16, 16).as_subclass(Interrupted), RATE)
    assert video.read_bytes() == before
    assert [file.name for file in video.parent.iterdir()] == [video.name]
