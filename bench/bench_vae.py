"""The encoder's three modes against stock tiled encoding of diffusers: the same clip, the same weights, in turn.

    pytest bench/bench_vae.py -k quarter        fits in three minutes on two cores; -k "half" and -k "full" take longer

Every output is held against untiled encoding, whose statistics are the clip's, before a time counts. Stock's tiles are
its defaults: 256 pixels every 192, 16 frames every 12.
"""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.harness import ROWS, Row
from bench.stock_vae import stock_vae
from k5kernels.vae import HunyuanEncoder, VAEConfig
from k5kernels.vae.plan import Mode

CLIP = (33, 256, 384)  # the smallest at which stock tiles time and space
WIDTHS = {
    "full": VAEConfig(),
    "half": VAEConfig(widths=(64, 128, 256, 256)),
    "quarter": VAEConfig(widths=(32, 64, 128, 128)),
}
TILE = (1, 3, 17, 96, 96)
# How many times as fast as stock each mode is at least, on a CPU.
FLOORS = {"tile": 2.5, "stream": 2.0, "exact": 2.0}
ROUNDS = {"full": 1, "half": 1, "quarter": 1}  # a call takes from a quarter of a minute to minutes
STOCK = "stock tiled"
# Of the norm of the exact latents; what normalizes by other statistics is not near them on random weights.
LARGEST_ERROR = {"exact": 1e-5, "stream": 1e-5, "tile": 1.0, STOCK: 1.0}


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


@pytest.mark.parametrize("width", WIDTHS)
@torch.inference_mode()
def test_encode(width):
    vae = stock_vae(WIDTHS[width])
    encoder = HunyuanEncoder.from_diffusers(vae)
    frames, height, side = CLIP
    video = torch.rand(1, 3, frames, height, side) * 2 - 1
    small = video[:, :, :5, :64, :64]
    encoder.encode(small, "exact")  # transforms the filters
    vae.encode(small)
    exact = None

    def check(variant, mean):
        nonlocal exact
        exact = mean if exact is None else exact
        error = float((mean - exact).norm() / exact.norm())
        assert mean.shape == (1, 16, 9, 32, 48)
        assert error < LARGEST_ERROR[variant], f"{variant}: {error:.1e} from the exact latents"

    variants: dict[str, Callable[[], torch.Tensor]] = {}
    modes: tuple[Mode, ...] = ("exact", "stream", "tile")
    for mode in modes:
        variants[mode] = partial(encode, encoder, video, mode)
    variants[STOCK] = lambda: vae.encode(video).latent_dist.mean
    rows = in_turn("encode", f"{width} width, {frames}x{height}x{side}", variants, check, ROUNDS[width])
    for name, floor in FLOORS.items():
        ratio = rows[name].ratios(STOCK)[1]
        assert ratio >= floor, f"{name}: {ratio:.2f}x {STOCK}, below the floor of {floor:g}x"


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
