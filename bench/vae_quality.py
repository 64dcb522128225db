"""What the encoder's modes lose on a real clip, with the nano VAE: a table, and a picture of the error at tile borders.

    python -m bench.vae_quality --clip bikes --frames 41
    python -m bench.vae_quality --clip bikes --frames 41 --decode       decodes as well: PSNR of the round trip

Untiled encoding is what every mode is held against. Stock is diffusers with tiling on, at its defaults.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
from model.nano import RESOLUTION, VAE_WEIGHTS
from train.clips import load_clip
from train.evaluation import psnr

MIB = 2**20
# Latent frames at which a tile begins, by mode: where its error may jump.
BORDERS = {"exact": None, "stream": None, "tile": 4, "tile, Kandinsky": 2, "stock tiled": 3}
Coder = Callable[[Tensor], Tensor]


def encoders(encoder: HunyuanEncoder, vae: Any) -> dict[str, Coder]:
    """Exact first."""

    def ours(mode, video, **settings):
        return encoder.encode(video, mode, **settings).mean

    return {
        "exact": partial(ours, "exact"),
        "stream": partial(ours, "stream"),
        "tile": partial(ours, "tile"),
        "tile, Kandinsky": partial(ours, "tile", tiling=KANDINSKY_TILING),
        "stock tiled": lambda video: vae.encode(video).latent_dist.mean,
    }


def decoders(decoder: HunyuanDecoder, vae: Any) -> dict[str, Coder]:
    """By the encoder's mode, the decoder's own of the same name."""
    modes = {mode: partial(decoder.decode, mode=mode) for mode in ("exact", "stream", "tile")}
    return {
        **modes,
        "tile, Kandinsky": partial(decoder.decode, mode="tile", tiling=KANDINSKY_TILING),
        "stock tiled": lambda latent: vae.decode(latent).sample,
    }


def seam_energy(mean: Tensor, exact: Tensor, stride: int | None) -> float:
    """How much larger the error's step from a latent frame to the next is where a tile begins than elsewhere (RMS)."""
    if stride is None:
        return 0.0
    steps = (mean - exact).diff(dim=2).square().mean(dim=(0, 1, 3, 4))
    at_border = torch.zeros(len(steps), dtype=torch.bool)
    at_border[stride::stride] = True
    return float((steps[at_border].mean() / steps[~at_border].mean()).sqrt())


def draw(errors: dict[str, Tensor], path: Path) -> None:
    """Each mode's error by latent frame and column, the mean over channels and rows."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

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
    modes: Annotated[str, typer.Option(help="some of them, with semicolons; exact is always taken")] = ";".join(
        BORDERS
    ),
    picture: Annotated[Path | None, typer.Option(help="where the picture of the errors goes")] = None,
) -> None:
    """Print the table of one clip."""
    encoder, decoder = HunyuanEncoder.from_pretrained(VAE_WEIGHTS), HunyuanDecoder.from_pretrained(VAE_WEIGHTS)
    vae = stock_vae(encoder.config, encoder, decoder)
    video = to_model(load_clip(clip, RESOLUTION)[-frames:])
    print(f"{clip}, the last {frames} frames, {video.shape[3]} x {video.shape[4]}; {machine()}")
    print("| mode | s | peak MiB | error to untiled | seam | PSNR dB |\n|---|---|---|---|---|---|")
    exact, errors = None, {}
    for mode, encode in encoders(encoder, vae).items():
        if mode != "exact" and mode not in modes.split(";"):
            continue
        start = time.perf_counter()
        with PeakMemory() as peak:
            mean = encode(video)
        seconds = time.perf_counter() - start
        exact = mean if exact is None else exact
        error = float((mean - exact).norm() / exact.norm())
        reached = ""
        if decode:
            reached = f"{psnr(decoders(decoder, vae)[mode](mean).clamp(-1, 1), video, peak=2.0):.2f}"
        seam = seam_energy(mean, exact, BORDERS[mode])
        print(f"| {mode} | {seconds:.1f} | {peak.bytes / MIB:.0f} | {error:.4f} | {seam:.1f} | {reached} |", flush=True)
        if mode != "exact":
            errors[mode] = ((mean - exact).square().mean(dim=(0, 1, 3)) / exact.square().mean()).sqrt()
    if picture is not None:
        draw(errors, picture)


if __name__ == "__main__":
    stop_in_one_line("bench.vae_quality")
    typer.run(main)
