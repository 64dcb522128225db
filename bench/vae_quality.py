"""What the VAE's modes lose on a real clip, with the nano VAE: a table, and a picture of the error at tile borders.

    python -m bench.vae_quality --clip bikes --frames 41
    python -m bench.vae_quality --clip bikes --frames 41 --decode       decodes as well: PSNR of the round trip

Every mode is held against the whole clip at once, whose latents `exact` gives but for rounding. Stock is diffusers with
tiling on, at its defaults.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import torch
import typer
from torch import Tensor

from bench.harness import machine
from bench.peak_memory import PeakMemory
from bench.stock_vae import stock_vae
from k5_command import stop_in_one_line
from k5kernels.latents.video import to_model
from k5kernels.vae import KANDINSKY_TILING, HunyuanDecoder, HunyuanEncoder
from k5kernels.vae.plan import Mode
from model.nano import RESOLUTION, VAE_WEIGHTS
from train.clips import load_clip, split
from train.evaluation import psnr

MIB = 2**20
UNTILED, STREAM, STOCK = "untiled", "stream", "stock tiled"
LOOKBACKS = (2, 4, 8)  # latent frames that attention sees
TIME, WIDTH = 2, 4
Coder = Callable[[Tensor], Tensor]


class Way(NamedTuple):
    """A way through the VAE. encode: video to the latent's mean. decode: that mean to video. borders: by dimension, at
    which latents one tile's share ends or fades and the next one's begins with the next latent."""

    encode: Coder
    decode: Coder
    borders: dict[int, slice]


def nano_ways() -> dict[str, Way]:
    """By name; the whole clip at once is the first."""
    encoder, decoder = HunyuanEncoder.from_pretrained(VAE_WEIGHTS), HunyuanDecoder.from_pretrained(VAE_WEIGHTS)
    vae = stock_vae(encoder.config, encoder, decoder)

    def ours(mode: Mode, borders: dict[int, slice] | None = None, **settings: Any) -> Way:
        def encode(video: Tensor) -> Tensor:
            return encoder.encode(video, mode, **settings).mean

        return Way(encode, partial(decoder.decode, mode=mode, **settings), borders or {})

    return {
        UNTILED: Way(lambda video: encoder.moments(video)[0], decoder.run_tile, {}),
        "exact": ours("exact"),
        STREAM: ours("stream"),
        **{f"stream, lookback {frames}": ours("stream", lookback=frames) for frames in LOOKBACKS},
        "tile": ours("tile", {TIME: slice(4, None, 4)}),
        "tile, Kandinsky": ours("tile", tiling=KANDINSKY_TILING),  # everywhere one tile fades into the next
        STOCK: Way(
            lambda video: vae.encode(video).latent_dist.mean,
            lambda latent: vae.decode(latent).sample,
            {TIME: slice(4, None, 3), WIDTH: slice(24, 32)},
        ),
    }


def load_end(clip: str, frames: int) -> Tensor:
    """The last frames of a clip, [1, 3, frames, H, W] in [-1, 1]."""
    return to_model(load_clip(clip, RESOLUTION)[-frames:])


class RoundTrip(NamedTuple):
    """PSNR [dB] of what was encoded and decoded: of all values, of those that stock averages from tiles that overlap
    there, and of the others."""

    everywhere: float
    in_overlaps: float
    elsewhere: float

    def __str__(self) -> str:
        return f"{self.everywhere:.2f} ({self.in_overlaps:.2f} / {self.elsewhere:.2f})"


def round_trip_of_unseen(decoded: Tensor, video: Tensor, clip: str) -> RoundTrip:
    """Of the end of a clip, over those of its frames that the nano VAE never saw: the last quarter."""
    frames, height, width = video.shape[2:]
    unseen = torch.arange(frames) >= frames - len(split(load_clip(clip, RESOLUTION))[1])
    overlaps = stock_overlaps(frames, height, width)

    def psnr_where(chosen: Tensor) -> float:
        chosen = chosen & unseen[:, None, None]
        return psnr(decoded[:, :, chosen].clamp(-1, 1), video[:, :, chosen], peak=2.0)

    return RoundTrip(psnr_where(torch.ones_like(overlaps)), psnr_where(overlaps), psnr_where(~overlaps))


def stock_overlaps(frames: int, height: int, width: int) -> Tensor:
    """Which values of a decoded video stock averages, bool [F, H, W].

    It fades from a tile into the next over 4 frames after every 12, but for the video's first, and in frames of more
    than 256 pixels a side over 64 after every 192. The first value of these is the former tile's alone.
    """

    def fades(size: int, stride: int, extent: int, first: int) -> Tensor:
        place = torch.arange(size) - first
        return (place >= stride) & (place % stride % extent > 0) & (place % stride < extent)

    time = fades(frames, 12, 4, first=1)[:, None, None].expand(frames, height, width)
    if max(height, width) <= 256:
        return time
    return time | fades(height, 192, 64, first=0)[:, None] | fades(width, 192, 64, first=0)


def relative_rms(mean: Tensor, untiled: Tensor) -> float:
    return float((mean - untiled).norm() / untiled.norm())


def seam_energy(error: Tensor, dimension: int, borders: slice) -> float:
    """How much larger the error's step from one latent to the next is at these latents than elsewhere (RMS)."""
    others = [other for other in range(error.ndim) if other != dimension]
    steps = error.diff(dim=dimension).square().mean(dim=others)
    at_border = torch.zeros(len(steps), dtype=torch.bool)
    at_border[borders] = True
    return float((steps[at_border].mean() / steps[~at_border].mean()).sqrt())


def draw(errors: dict[str, Tensor], path: Path) -> None:
    """Each mode's error by latent frame and column, RMS over channels and rows."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    errors = {mode: error.square().mean(dim=(0, 1, 3)).sqrt() for mode, error in errors.items()}
    figure, axes = plt.subplots(1, len(errors), figsize=(3 * len(errors), 3), sharey=True, layout="constrained")
    largest = max(float(error.max()) for error in errors.values())
    for axis, (mode, error) in zip(axes, errors.items(), strict=True):
        image = axis.imshow(error, vmin=0, vmax=largest, aspect="auto", cmap="magma")
        axis.set(title=mode, xlabel="column of the latent")
    axes[0].set_ylabel("latent frame")
    figure.colorbar(image, ax=axes, label="error / RMS of the latent")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main(
    clip: Annotated[str, typer.Option(help="one of train.clips.NAMES")] = "bikes",
    frames: Annotated[int, typer.Option(help="the last so many of the clip, 1 + a multiple of 4")] = 41,
    decode: Annotated[bool, typer.Option(help="decode too")] = False,
    modes: Annotated[str | None, typer.Option(help="some of them, with semicolons; untiled is always taken")] = None,
    picture: Annotated[Path | None, typer.Option(help="where the picture of the errors goes")] = None,
) -> None:
    """Print the table of one clip."""
    ways = nano_ways()
    if modes is not None:
        ways = {name: ways[name] for name in (UNTILED, *modes.split(";"))}
    video = load_end(clip, frames)
    next(iter(ways.values())).encode(video[:, :, :5, :64, :64])  # loads the kernels
    print(f"{clip}, the last {frames} frames, {video.shape[3]} x {video.shape[4]}; {machine()}")
    print(f"{torch.get_num_threads()} threads, float32; s and MiB of encoding, dB of the round trip")
    print(
        "| mode | s | peak MiB | error to untiled | seam in time | seam in width | PSNR dB (stock's overlaps / not) |"
    )
    print("|---|---|---|---|---|---|---|")
    untiled, errors = None, dict[str, Tensor]()
    for name, way in ways.items():
        start = time.perf_counter()
        with PeakMemory() as peak:
            mean = way.encode(video)
        seconds = time.perf_counter() - start
        untiled = mean if untiled is None else untiled
        errors[name] = mean - untiled
        figures = [f"{seconds:.1f}", f"{peak.bytes / MIB:.0f}", f"{relative_rms(mean, untiled):.2g}"]
        for axis in (TIME, WIDTH):
            borders = way.borders.get(axis)
            figures.append("–" if borders is None else f"{seam_energy(errors[name], axis, borders):.1f}")
        figures.append(str(round_trip_of_unseen(way.decode(mean), video, clip)) if decode else "–")
        print(f"| {name} | {' | '.join(figures)} |", flush=True)
    if picture is not None and untiled is not None:
        shown = (name for name in errors if name not in (UNTILED, "exact"))
        draw({name: errors[name] / untiled.square().mean().sqrt() for name in shown}, picture)


if __name__ == "__main__":
    stop_in_one_line("bench.vae_quality")
    typer.run(main)
