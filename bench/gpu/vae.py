"""The VAE encoder's modes on a GPU: checked against untiled encoding, then timed against diffusers with tiling on.

The attention of the middle block must find a kernel that does not write all its scores: while outputs are checked,
PyTorch's math path is forbidden to ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.gpu.timing import interleaved, quartiles
from bench.stock_vae import stock_vae
from k5kernels.vae import HunyuanEncoder, VAEConfig
from k5kernels.vae.tile_runners import CompiledTiles, GraphedTiles

CLIP, TINY_CLIP = (65, 512, 768), (21, 24, 24)
LENGTHS, TINY_LENGTHS = (33, 121), (33, 37)
TINY = VAEConfig(widths=(32, 32, 32, 32), layers_per_block=1)
ROUNDS = 3
MIB = 2**20
# Of the norm of exact latents: two orders of bf16 sums.
LARGEST_DIFFERENCE = 5e-2
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@torch.no_grad()
def vae(run: Run) -> None:
    """Rows in ms and MiB at 65 x 512 x 768, and of `stream`'s memory at 33 and at 121 frames."""
    config = VAEConfig() if run.device.type == "cuda" else TINY
    stock = stock_vae(config).to(run.device, torch.bfloat16)
    encoder = HunyuanEncoder.from_diffusers(stock)
    on_gpu = run.device.type == "cuda"
    frames, height, width = CLIP if on_gpu else TINY_CLIP
    video = _video(frames, height, width, run.device)
    variants: dict[str, Callable[[], Tensor]] = {
        mode: partial(lambda mode: encoder.encode(video, mode).mean, mode) for mode in ("exact", "stream", "tile")
    }
    if on_gpu:
        compiled, graphed = CompiledTiles(encoder), GraphedTiles(encoder)
        variants["tile, torch.compile"] = lambda: encoder.encode(video, "tile", runner=compiled).mean
        variants["tile, CUDA graph"] = lambda: encoder.encode(video, "tile", runner=graphed).mean
    variants["stock tiled"] = lambda: stock.encode(video).latent_dist.mean
    size = f"{frames}x{height}x{width}, bf16"
    _check(variants, encoder, video)
    _time(run, size, variants)
    for length in LENGTHS if on_gpu else TINY_LENGTHS:
        clip = _video(length, height, width, run.device)
        peak = _peak(run, partial(encoder.encode, clip, "stream"))
        _keep(run, f"{length}x{height}x{width}, bf16", "stream", "MiB", peak)
    if on_gpu:
        _keep(run, size, "tile, torch.compile: compiling", "ms", 1e3 * sum(compiled.seconds.values()))


def _check(variants: dict[str, Callable[[], Tensor]], encoder: HunyuanEncoder, video: Tensor) -> None:
    with sdpa_kernel(KERNELS):
        exact = variants["exact"]()
    assert torch.equal(exact, variants["exact"]()), "two runs of exact differ"
    short = video[:, :, :17]
    whole = encoder.moments(short)[0]
    _assert_near(encoder.encode(short, "exact").mean, whole, "exact against the whole clip at once")
    _assert_near(encoder.encode(short, "tile").mean, whole, "a clip of one tile against the whole clip at once")
    tiles = variants["tile"]()
    for name, call in variants.items():
        out = call()
        assert out.shape == exact.shape, f"{name}: expected {list(exact.shape)}, got {list(out.shape)}"
        if name.startswith("tile"):
            _assert_near(out, tiles, name)


def _time(run: Run, size: str, variants: dict[str, Callable[[], Any]]) -> None:
    for name, times in interleaved(variants, ROUNDS).items():
        lower, median, upper = quartiles(times)
        run.keep(Row("vae", size, None, None, name, "ms", median, lower, upper, len(times)))
        _keep(run, size, name, "MiB", _peak(run, variants[name]))


def _peak(run: Run, call: Callable[[], Any]) -> float:
    """MiB beyond what is there before the call; 0 on the CPU, where PyTorch does not count."""
    if run.device.type != "cuda":
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _keep(run: Run, size: str, variant: str, unit: str, value: float) -> None:
    run.keep(Row("vae", size, None, None, variant, unit, value))


def _video(frames: int, height: int, width: int, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(0)
    return torch.rand(1, 3, frames, height, width, device=device, generator=random).to(torch.bfloat16) * 2 - 1


def _assert_near(one: Tensor, other: Tensor, what: str) -> None:
    difference = float((one.float() - other.float()).norm() / other.float().norm())
    assert difference <= LARGEST_DIFFERENCE, f"{what}: they differ by {difference:.1e} of their norm"
