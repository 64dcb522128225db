"""What an accelerated run did: how dense its attention was, what a cache skipped, how the VAE went through a clip, and
where and why something ran as before."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask
from k5kernels.cache import CacheReport

DENSE_STEPS = "one of the first steps, which were asked to be dense"
DENSE_MASK = "its mask was too dense to gain by it"
DENSE = (DENSE_STEPS, DENSE_MASK)


class Report:
    """Calls of self-attention: the density of the block mask by layer, step and head, and reasons where there was none.

    densities: layer -> step -> one value a head, [h], the mean over the samples, for each pass of the model; empty
    where densities were not asked for, and in compiled code. unchanged: reason -> number of calls that ran as they
    would have without us (densely, where the model itself never does). engines: engine -> number of calls. notes: what
    a user should know before trusting the result. caches: one for each model that has one. vae: what its encoder and
    decoder did -> number of calls.
    """

    def __init__(self) -> None:
        self.densities: dict[int, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.unchanged: dict[str, int] = defaultdict(int)
        self.engines: dict[str, int] = defaultdict(int)
        self.notes: list[str] = []
        self.caches: list[CacheReport] = []
        self.vae: dict[str, int] = defaultdict(int)

    def add(self, layer: int, step: int, mask: BlockMask) -> None:
        """Notes the density of a mask."""
        self.densities[layer][step].append(mask.densities.mean(dim=0).cpu())

    def by_head(self) -> Tensor:
        """[layers, h], the means over steps and passes; empty where no density is known."""
        rows = [torch.stack([one for passes in steps.values() for one in passes]) for steps in self._layers()]
        return torch.stack([row.mean(dim=0) for row in rows]) if rows else torch.empty(0, 0)

    def by_step(self) -> Tensor:
        """[layers, steps], the means over heads and passes; NaN where a step had none."""
        layers = list(self._layers())
        steps = sorted({step for layer in layers for step in layer})
        values = [
            [float(torch.stack(layer[step]).mean()) if step in layer else torch.nan for step in steps]
            for layer in layers
        ]
        return torch.tensor(values) if values else torch.empty(0, 0)

    def _layers(self) -> Iterator[dict[int, list[Tensor]]]:
        return (self.densities[layer] for layer in sorted(self.densities))

    @property
    def density(self) -> float | None:
        """The mean over all layers, steps and passes; None where none is known."""
        found = [float(one.mean()) for steps in self._layers() for passes in steps.values() for one in passes]
        return fmean(found) if found else None

    def __str__(self) -> str:
        """A line for each thing to say."""
        lines = [f"attention by {engine}: {count} calls" for engine, count in self.engines.items()]
        if self.density is not None:
            by_layer = self.by_head().mean(dim=1)
            lines.append(
                f"density {self.density:.1%} (of layers {by_layer.min():.1%} to {by_layer.max():.1%}, "
                f"{len(by_layer)} layers; of heads {self.by_head().min():.1%} to {self.by_head().max():.1%})"
            )
        lines += [f"as before: {count} calls, {reason}" for reason, count in self.unchanged.items()]
        lines += [str(cache) for cache in self.caches]
        lines += [f"VAE, {count} calls: {done}" for done, count in self.vae.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines) if lines else "no call yet"

    def draw(self, path: Path | str) -> None:
        """A picture of the densities: layers by steps, and layers by heads. Raises ValueError where none are known."""
        if self.density is None:
            raise ValueError("report: no density is known; ask accelerate for densities=True, and run uncompiled")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        parts = ((self.by_step(), "step"), (self.by_head(), "head"))
        for axes, (values, name) in zip(figure.subplots(1, 2), parts, strict=True):
            image = axes.imshow(values.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set(xlabel=name, ylabel="layer", title=f"density, mean {self.density:.0%}")
        figure.colorbar(image, ax=figure.axes)
        figure.savefig(path)
