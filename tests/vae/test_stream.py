"""One pass over chunks: by the clip's own statistics it is exact, and its memory does not grow with the clip."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from vae_models import TINIEST, diffusers_vae, relative_error

from bench.peak_memory import PeakMemory
from k5kernels.latents.video import to_model
from k5kernels.ops.groupnorm_statistics import groupnorm_statistics
from k5kernels.vae import HunyuanEncoder
from k5kernels.vae.passes import Storage, layer_by_layer, one_pass
from k5kernels.vae.sample import WINDOW_FRAMES, WINDOWS, sample_of
from k5kernels.vae.tiling import Tiling
from model.nano import VAE_WEIGHTS
from train.clips import load_clip

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def encoder() -> HunyuanEncoder:
    return HunyuanEncoder.from_diffusers(diffusers_vae(TINIEST))


def random_video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def peak_bytes(encoder: HunyuanEncoder, video: Tensor, **arguments) -> int:
    with PeakMemory() as peak:
        encoder.encode(video, **arguments)
    return peak.bytes


@pytest.mark.parametrize("chunks", [[9, 8, 8], [1, 24], [2, 5, 9, 9]])
def test_by_the_clips_own_statistics_one_pass_is_exact(encoder, chunks):
    video = random_video(2, 3, 25, 16, 24)
    with Storage(None) as storage:
        outputs, statistics = layer_by_layer(encoder.steps(), video.split(chunks, dim=2), storage)
    streamed = torch.cat(list(one_pass(encoder.steps(), video.split(chunks, dim=2), statistics)), dim=2)
    assert relative_error(streamed, torch.cat(outputs, dim=2)) < 1e-5


def test_up_to_33_frames_stream_is_exact(encoder):
    video = random_video(1, 3, 33, 16, 16)
    exact = encoder.encode(video, "exact").mean
    assert relative_error(encoder.encode(video, "stream").mean, exact) < 1e-5
    assert relative_error(encoder.encode(video, "tile").mean, exact) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_longer_clip_streams_in_half_precision_too(dtype):
    video, narrow = random_video(1, 3, 37, 16, 16), HunyuanEncoder.from_diffusers(diffusers_vae(TINIEST)).to(dtype)
    expected = narrow.float().encode(video.to(dtype).float(), "stream").mean
    out = narrow.to(dtype).encode(video, "stream").mean
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < 0.05


@pytest.mark.parametrize("frames", [37, 129, 133, 1001])
@pytest.mark.parametrize("chunk", [4, 8])
def test_a_sample_is_spread_over_the_clip_and_does_not_grow_with_it(frames, chunk):
    sample = sample_of(frames, chunk)
    windows = sample.windows()
    assert len(windows) == WINDOWS
    for number, (first, end) in enumerate(windows):
        assert end - first == WINDOW_FRAMES
        assert abs((first + end) / 2 - frames * (number + 0.5) / WINDOWS) <= 4
        assert 0 <= first < end <= frames
    assert all(one[1] <= other[0] for one, other in pairwise(windows))
    latents = sample.in_latents().windows()
    assert [end - first for first, end in latents] == [3] * WINDOWS
    assert latents[-1][1] <= 1 + (frames - 1) // 4


def test_what_a_window_opens_with_does_not_count(encoder):
    """Its first frame has copies before it, as no frame inside a clip has."""
    video = random_video(1, 3, 18, 16, 16)
    chunks, openings = video.split([1, 8, 1, 8], dim=2), {0, 2}
    with Storage(None) as storage:
        outputs, statistics = layer_by_layer(encoder.steps(), chunks, storage, openings)
        first = next(found for found in statistics if found is not None)
    halves = [encoder.conv_in(half) for half in video.split(9, dim=2)]
    counted = groupnorm_statistics(torch.cat([half[:, :, 1:] for half in halves], dim=2), TINIEST.groups)
    torch.testing.assert_close(first.mean, counted.mean)
    torch.testing.assert_close(first.variance, counted.variance)
    assert [out.shape[2] for out in outputs] == [1, 2, 1, 2]


def test_memory_does_not_grow_with_the_clip(encoder):
    short, long = (peak_bytes(encoder, random_video(1, 3, frames, 32, 32), mode="stream") for frames in (33, 121))
    video_and_latents = 4 * (121 - 33) * (3 * 32 * 32 + 2 * 32 * 4 * 4 // 4)
    assert long - video_and_latents <= 1.1 * short


@pytest.mark.parametrize("mode", ["exact", "stream", "tile"])
@pytest.mark.parametrize("frames", [17, 49])
def test_the_plan_knows_the_memory(encoder, mode, frames):
    video = random_video(1, 3, frames, 48, 48)
    planned = encoder.plan(video.shape, mode).peak_bytes
    assert peak_bytes(encoder, video, mode=mode) <= 1.1 * planned + 2 * video.nbytes
    assert peak_bytes(encoder, video, mode=mode) >= 0.4 * planned


def test_a_long_clip_of_512_by_768_streams_in_8_gib():
    with torch.device("meta"):
        encoder = HunyuanEncoder().bfloat16()
    for frames in (33, 65, 121, 241):
        assert encoder.plan((1, 3, frames, 512, 768), "stream").peak_bytes <= 8 * 2**30


@pytest.mark.parametrize("mode", ["exact", "stream", "tile"])
def test_a_budget_is_kept(encoder, mode):
    video, tiling = random_video(1, 3, 41, 64, 64), Tiling(overlap=8)
    budget = encoder.plan(video.shape, mode).peak_bytes // 2
    peak = peak_bytes(encoder, video, mode=mode, memory_budget=budget, tiling=tiling)
    assert peak <= 1.1 * budget + 2 * video.nbytes


def test_a_lookback_over_the_whole_clip_changes_nothing_and_a_shorter_one_does(encoder):
    video = random_video(1, 3, 49, 16, 16)
    whole = encoder.encode(video).mean
    torch.testing.assert_close(encoder.encode(video, lookback=13).mean, whole, rtol=0, atol=0)
    assert relative_error(encoder.encode(video, lookback=2).mean, whole) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes"])
def test_on_a_real_clip_stream_is_much_nearer_to_exact_than_tiles_are(name):
    nano = HunyuanEncoder.from_pretrained(VAE_WEIGHTS)
    frames = load_clip(name, 256)[-65:]
    top, left = ((side - 96) // 2 for side in frames.shape[1:3])
    video = to_model(frames[:, top : top + 96, left : left + 96])
    exact = nano.encode(video, "exact").mean
    stream, tile = ((nano.encode(video, mode).mean - exact).norm() for mode in ("stream", "tile"))
    assert stream < tile / 1.5
