"""A picture of a training: its losses, from its log, above what it made of a caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from k5kernels.atomic import replacing

WIDTH, LOSSES_HEIGHT = 7.0, 3.5  # inches


def draw_losses(rows: Sequence[Mapping[str, Any]], path: Path, samples: Mapping[int, Path] | None = None) -> None:
    """The mean loss of every row against its step, as PNG; rows without one, where no step was taken, leave a gap.

    samples: step -> a picture, drawn below in this order, the width of the figure each. Raises OSError where one
    cannot be read or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    below = {step: pyplot.imread(picture) for step, picture in (samples or {}).items()}
    heights = [LOSSES_HEIGHT, *(WIDTH * picture.shape[0] / picture.shape[1] + 0.3 for picture in below.values())]
    figure, axes = pyplot.subplots(
        len(heights),
        1,
        figsize=(WIDTH, sum(heights)),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    axis, *strips = axes[:, 0]
    losses = [float("nan") if row["loss"] is None else row["loss"] for row in rows]
    axis.plot([row["step"] for row in rows], losses, marker="." if len(rows) < 50 else None)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    for strip, (step, picture) in zip(strips, below.items(), strict=True):
        axis.axvline(step, color="0.6", linewidth=0.8, linestyle="--")
        strip.imshow(picture)
        strip.set_title(f"step {step}", loc="left", fontsize=9)
        strip.set_axis_off()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def write_picture(pixels: Tensor, path: Path) -> None:
    """uint8 [H, W, 3] as PNG. Raises OSError where the file cannot be written."""
    from matplotlib.image import imsave

    with replacing(path) as partial:
        imsave(partial, pixels.numpy(), format="png")
