"""The encoder's three modes against stock tiled encoding of diffusers: the same clip, the same weights, in turn.

    pytest bench/bench_vae.py -k "not half and not full"    fits in ten minutes on two cores; the others take longer

Every output is held against untiled encoding, whose statistics are the clip's, before a time counts. Stock's tiles are
its defaults: 256 pixels every 192, 16 frames every 12. At 33 frames `stream` is `exact`; what statistics of a sample
cost and lose is seen on the longer clip, and on real clips with the nano VAE.
"""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.harness import ROWS, Row
from bench.peak_memory import PeakMemory
from bench.stock_vae import stock_vae
from bench.vae_quality import (
    STOCK,
    STREAM,
    UNTILED,
    load_end,
    nano_ways,
    relative_rms,
    round_trip_of_unseen,
    seam_energy,
)
from k5kernels.vae import HunyuanEncoder, VAEConfig, latent_frames
from train.clips import NAMES

CLIP = (33, 256, 384)  # the smallest at which stock tiles time and space
LONG_CLIP = (65, 256, 384)
WIDTHS = {
    "full": VAEConfig(),
    "half": VAEConfig(widths=(64, 128, 256, 256)),
    "quarter": VAEConfig(widths=(32, 64, 128, 128)),
}
TILE = (1, 3, 17, 96, 96)
# How many times as fast as stock each mode is at least, on a CPU.
FLOORS = {"tile": 2.5, "stream": 2.0, "exact": 2.0}
ROUNDS = {"full": 1, "half": 1, "quarter": 1}  # a call takes from a quarter of a minute to minutes
# Of the norm of the exact latents; what normalizes by other statistics is not near them on random weights.
LARGEST_ERROR = {"exact": 1e-5, "stream": 1e-5, "tile": 1.0, STOCK: 1.0}
LARGEST_OF_A_SAMPLE = 0.3  # of `stream` on random weights
MIB = 2**20
REAL_FRAMES = 41
COMPARED = ("exact", STREAM, STOCK)
ERROR_FLOOR = 3.0  # how many times smaller the error of `stream` is than stock's
MEMORY_FLOOR = 1.1  # how many times as much memory `stream` takes for a long clip as for a short one
LENGTHS, SMALL_FRAME = (33, 121), (128, 192)


def in_turn(name, sizes, variants, check, rounds):
    """Rows of every variant but the last against the last. A call takes too long to make one that is not timed: the
    caller has warmed up on something small."""
    samples: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, call in variants.items():
            start = time.perf_counter()
            out = call()
            samples[variant].append(1e3 * (time.perf_counter() - start))
            check(variant, out)
    *ours, last = variants
    rows = [Row(name, sizes, torch.get_num_threads(), {one: samples[one], last: samples[last]}) for one in ours]
    ROWS.extend(rows)
    return dict(zip(ours, rows, strict=True))


def encode(encoder, video, mode):
    return encoder.encode(video, mode).mean


def encode_in_turn(width, clip, modes, largest_error):
    """Rows of the modes against stock, `exact` first."""
    vae = stock_vae(WIDTHS[width])
    encoder = HunyuanEncoder.from_diffusers(vae)
    frames, height, side = clip
    video = torch.rand(1, 3, frames, height, side) * 2 - 1
    small = video[:, :, :5, :64, :64]
    encoder.encode(small, "exact")  # transforms the filters
    vae.encode(small)
    exact = None

    def check(variant, mean):
        nonlocal exact
        exact = mean if exact is None else exact
        assert mean.shape == (1, 16, latent_frames(frames), height // 8, side // 8)
        error = relative_rms(mean, exact)
        assert error < largest_error[variant], f"{variant}: {error:.1e} from the exact latents"

    variants: dict[str, Callable[[], torch.Tensor]] = {}
    for mode in modes:
        variants[mode] = partial(encode, encoder, video, mode)
    variants[STOCK] = lambda: vae.encode(video).latent_dist.mean
    rows = in_turn("encode", f"{width} width, {frames}x{height}x{side}", variants, check, ROUNDS[width])
    for name in modes:
        ratio = rows[name].ratios(STOCK)[1]
        assert ratio >= FLOORS[name], f"{name}: {ratio:.2f}x {STOCK}, below the floor of {FLOORS[name]:g}x"


@pytest.mark.parametrize("width", WIDTHS)
@torch.inference_mode()
def test_encode(width):
    encode_in_turn(width, CLIP, ("exact", "stream", "tile"), LARGEST_ERROR)


@torch.inference_mode()
def test_encode_by_statistics_of_a_sample():
    encode_in_turn("quarter", LONG_CLIP, ("exact", "stream"), LARGEST_ERROR | {"stream": LARGEST_OF_A_SAMPLE})


@pytest.mark.parametrize("clip", NAMES)
@torch.inference_mode()
def test_error_on_a_real_clip(clip):
    ways, video = nano_ways(), load_end(clip, REAL_FRAMES)
    untiled, errors = ways[UNTILED].encode(video), {}
    for name in (*COMPARED, "tile", "tile, Kandinsky"):
        mean = ways[name].encode(video)
        errors[name] = relative_rms(mean, untiled)
        seams = [f"{seam_energy(mean - untiled, axis, at):.1f}" for axis, at in ways[name].borders.items()]
        print(f"{clip}: {name}: error {errors[name]:.2g}, seams {', '.join(seams) or 'none'}", flush=True)
    assert errors["exact"] < LARGEST_ERROR["exact"]
    assert ERROR_FLOOR * errors[STREAM] <= errors[STOCK]


@pytest.mark.parametrize("clip", NAMES)
@torch.inference_mode()
def test_round_trip_of_a_real_clip(clip):
    ways, video = nano_ways(), load_end(clip, REAL_FRAMES)
    reached = {}
    for name in COMPARED:
        decoded = ways[name].decode(ways[name].encode(video))
        reached[name] = round_trip_of_unseen(decoded, video, clip)
        print(f"{clip}: {name}: round trip {reached[name]} dB (in stock's overlaps / not)", flush=True)
    for name in ("exact", STREAM):
        assert reached[name].everywhere >= reached[STOCK].everywhere, name


@torch.inference_mode()
def test_memory_of_a_long_clip():
    encoder = HunyuanEncoder(WIDTHS["quarter"]).eval()
    peaks = []
    for frames in LENGTHS:
        video = torch.rand(1, 3, frames, *SMALL_FRAME) * 2 - 1
        with PeakMemory() as peak:
            mean = encoder.encode(video, "stream").mean
        keys_and_values = 2 * (mean[0, 0].numel() * encoder.config.widths[-1]) * mean.element_size()
        peaks.append(peak.bytes - keys_and_values - 2 * mean.nbytes)  # moments, of which the mean is a part
    print(f"stream, {LENGTHS} frames of {SMALL_FRAME}: {[round(peak / MIB) for peak in peaks]} MiB")
    assert peaks[1] <= MEMORY_FLOOR * peaks[0]


@torch.inference_mode()
def test_one_tile_at_full_width():
    """What a tile's computation takes, tiling aside: the same operations for both."""
    vae = stock_vae(VAEConfig())
    encoder = HunyuanEncoder.from_diffusers(vae)
    video = torch.rand(TILE) * 2 - 1
    expected = vae.quant_conv(vae.encoder(video))

    def check(variant, moments):
        torch.testing.assert_close(moments, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    variants = {"tile": lambda: encoder.run_tile(video), STOCK: lambda: vae.quant_conv(vae.encoder(video))}
    in_turn("one tile", f"full width, {'x'.join(map(str, TILE[2:]))}", variants, check, rounds=3)
