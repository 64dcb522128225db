"""`k5 encode` end to end: clips a second, and which share of the time each part takes.

    pytest bench/bench_encode.py -s -k nano        half a minute on two cores
    pytest bench/bench_encode.py -s -k full        minutes; on a GPU, where there is one, in bfloat16 at 512
    pytest bench/bench_encode.py -s -k frame       what a thread takes to read a frame: how many an encoder needs
    pytest bench/bench_encode.py -s -k batch       pictures in the job's batches, against one by one

Sources are the demo's clips, at 1280×720 and 640×272; every frame is encoded once, by random weights where the width is
the released one. Decoding and resizing run in threads beside the encoder, on a CPU on its cores.
"""

import statistics
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from bench.harness import machine
from k5kernels.device import choose_device
from k5kernels.latents.ahead import threads_beside
from k5kernels.latents.encode import encoder_dtype
from k5kernels.latents.encoders import latent
from k5kernels.latents.job import encode_videos
from k5kernels.latents.pictures import BATCH_PIXELS
from k5kernels.latents.video import EVERY_FRAME, read_clips, read_video, write_video
from k5kernels.vae import HunyuanEncoder
from k5kernels.vae.weights import load_encoder
from model.nano import VAE_WEIGHTS
from train.clips import clip_path

SOURCES = ("bigbuckbunny", "bikes")
# Of a run's time.
MOST_WAITING = 0.05
ROUNDS = 5
LARGEST_ERROR = 1e-3  # of the latents' standard deviation; they are stored in float16
LEAST_GAIN = 1.0  # of a batch, where it is more than one picture


@dataclass(frozen=True)
class Case:
    """clip_frames: of a clip. clips: of each source, at most."""

    resolution: int
    clip_frames: int
    clips: int


CASES = {"nano": Case(256, 25, 4), "full": Case(256, 17, 1)}
ON_A_GPU = Case(512, 121, 2)


@pytest.mark.parametrize("width", CASES)
def test_the_encoder_hardly_waits(width: str, tmp_path: Path) -> None:
    device = choose_device()
    case = CASES[width] if device.type == "cpu" else ON_A_GPU
    torch.manual_seed(0)
    encoder = load_encoder(VAE_WEIGHTS) if width == "nano" else HunyuanEncoder().eval()
    encoder.to(device, encoder_dtype(None, device))
    summary = encode_videos(
        [clip_path(name) for name in SOURCES],
        encoder,
        tmp_path / "out",
        resolution=case.resolution,
        clip_frames=case.clip_frames,
        max_clips=case.clips,
        decoders=threads_beside(device),
    )
    assert summary.failures == {}
    seconds = summary.seconds
    size = f"{width} width, {device}, {summary.samples} clips of {case.clip_frames} frames at {case.resolution}"
    print(f"\n{size}: {summary.samples / seconds.run:.3g} clips/s; {seconds}; {machine()}")
    assert seconds.wait <= MOST_WAITING * seconds.run


@pytest.mark.parametrize(("height", "width", "resolution"), [(720, 1280, 512), (1080, 1920, 512), (1080, 1920, 1024)])
def test_what_a_frame_takes_to_read(height: int, width: int, resolution: int, tmp_path: Path) -> None:
    """In one thread, but for H.264's decoder, which has four."""
    frames, _ = read_video(clip_path("bigbuckbunny"), height, width, max_frames=25)
    write_video(tmp_path / "v.mp4", frames, Fraction(24))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began, worked = time.perf_counter(), time.process_time()
        (clip,) = read_clips(tmp_path / "v.mp4", resolution, 25, EVERY_FRAME)
        taken, worked = time.perf_counter() - began, time.process_time() - worked
    finally:
        torch.set_num_threads(before)
    assert len(clip.frames) == 25
    each = [
        f"{name} {1e3 * seconds / 25:.1f} ms"
        for name, seconds in (
            ("decoding", taken - clip.resize_seconds),
            ("resizing", clip.resize_seconds),
            ("of all cores", worked),
        )
    ]
    size = "×".join(map(str, clip.frames.shape[1:3]))
    print(f"\na frame of {height}×{width} to {size}: {', '.join(each)}; {machine()}")


@pytest.mark.parametrize("side", [256, 512])
@torch.inference_mode()
def test_pictures_in_a_batch(side: int) -> None:
    encoder, count = load_encoder(VAE_WEIGHTS), BATCH_PIXELS // side**2
    pictures = torch.rand(count, 3, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seconds: dict[str, list[float]] = {"one by one": [], "together": []}
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        alone = torch.cat([latent(encoder, picture[None], "stream", None) for picture in pictures])
        between = time.perf_counter()
        together = latent(encoder, pictures, "stream", None)
        if number:  # the first round transforms the filters
            seconds["one by one"].append(between - began)
            seconds["together"].append(time.perf_counter() - between)
    each = [f"{name} {1e3 * statistics.median(spent) / count:.0f} ms" for name, spent in seconds.items()]
    error = float((together - alone).abs().max() / alone.std())
    assert error < LARGEST_ERROR
    gain = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    assert gain >= LEAST_GAIN
    print(f"\na picture of {side}×{side}, nano, {count}: {', '.join(each)} ({gain:.2f}×); differ by {error:.1e} of std")
    print(machine())
