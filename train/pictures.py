"""A picture of a training's losses, from its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k5kernels.atomic import replacing


def draw_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The mean loss of every row against its step, as PNG; rows without one, where no step was taken, leave a gap.

    Raises OSError where the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [float("nan") if row["loss"] is None else row["loss"] for row in rows]
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axis.plot([row["step"] for row in rows], losses, marker="." if len(rows) < 50 else None)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
