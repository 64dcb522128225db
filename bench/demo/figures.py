"""The demo's pictures."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from k5kernels.atomic import replacing
from k5kernels.block_mask import BlockMask
from k5kernels.token_layout import TokenLayout


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, bbox_inches="tight", format="png")
    return path


def draw_loss(losses: list[float], path: Path) -> Path:
    """Loss of every step and its running mean."""
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    window = min(8, len(losses))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(range(1, len(losses) + 1), losses, ".", color="0.7", label="step")
    axes.plot(range(window, len(losses) + 1), mean, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="flow-matching loss", ylim=(0, None))
    axes.legend(frameon=False)
    return _save(figure, path)


def draw_block_masks(mask: BlockMask, layout: TokenLayout, frames: Tensor, path: Path) -> Path:
    """Which key blocks one query block reads: they are bright in the frames. A row for each of three heads, a
    column for each latent frame.

    frames: uint8 [T, H, W, 3], the video frame at each latent frame. The query block is the one in the middle
    of the first frame; it is outlined.
    """
    dense = mask.to_dense()[0, :3].cpu().numpy()
    heads = range(len(dense))
    coordinates = layout.block_coordinates("cpu").numpy()
    clip_t, clip_h, _ = layout.clips[0]
    _, rows, columns = layout.block_grid(0)
    query = (rows // 2) * columns + columns // 2
    side = layout.block_side * frames.shape[1] / clip_h
    figure = Figure(figsize=(1.9 * clip_t, 1.5 * len(heads)), layout="constrained")
    grid = figure.subplots(len(heads), clip_t, squeeze=False)
    for row, head in enumerate(heads):
        for t in range(clip_t):
            axes = grid[row, t]
            shade = np.full((*frames.shape[1:3], 1), 0.25)
            for block in np.flatnonzero(dense[head, query] & (coordinates[:, 1] == t)):
                y, x = (round(float(at) * side) for at in coordinates[block, 2:])
                shade[y : y + round(side), x : x + round(side)] = 1.0
            axes.imshow((frames[t].numpy() * shade).astype(np.uint8))
            if t == 0:
                corner = ((query % columns) * side, (query // columns) * side)
                axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="red", linewidth=1.5))
                axes.set_ylabel(f"head {head}\n{dense[head].mean():.0%} kept", fontsize=8)
            if row == 0:
                axes.set_title(f"latent frame {t}", fontsize=8)
            axes.set(xticks=[], yticks=[])
    return _save(figure, path)


def draw_schedule(schedule: dict[str, list[bool]], ratios: dict[str, list[float]], path: Path) -> Path:
    """MagCache: the calibrated ratios, and which steps ran the blocks."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for branch, values in ratios.items():
        top.plot(range(1, len(values) + 1), values, label=branch)
    top.set_ylabel("residual ratio")
    top.legend(frameon=False)
    for row, computed in enumerate(schedule.values()):
        for value, color, label in ((True, "tab:blue", "blocks ran"), (False, "0.85", "residual reused")):
            steps = [step for step, ran in enumerate(computed) if ran == value]
            bottom.bar(steps, 0.8, bottom=row - 0.4, color=color, label=label if row == 0 else None)
    bottom.set(yticks=range(len(schedule)), yticklabels=list(schedule), xlabel="step")
    bottom.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return _save(figure, path)
