"""The two ways through a half of the VAE, and where its activations are kept (§7.1).

Step by step (`layer_by_layer`): every step takes all chunks of the clip before the next step begins, so each GroupNorm
has the statistics of the whole clip. That is exact, and keeps whole activations: what does not fit in the budget of the
device goes to host memory, or from there to a file.

Chunk by chunk (`one_pass`): every chunk takes all steps, by statistics known beforehand. Only what the next chunk needs
is kept.
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k5kernels.ops.groupnorm_statistics import GroupStatistics, groupnorm_statistics
from k5kernels.vae.steps import Step

# Of the steps in order; None where one does not normalize.
Statistics = list[GroupStatistics | None]


class Storage:
    """Chunks of activations: up to `limit` bytes stay where they are, the others wait in host memory, or in files where
    they come from there. Which ones depends on their order and sizes alone. limit None: all stay.

    A context manager: its files are deleted at its end.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.held = 0
        self.spilled = 0  # bytes, all together
        self._folder: tempfile.TemporaryDirectory | None = None
        self._files = 0

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def keep(self, chunk: Tensor) -> "Kept":
        if self.limit is None or self.held + chunk.nbytes <= self.limit or chunk.numel() == 0:
            self.held += chunk.nbytes
            return Kept(self, chunk, chunk.device, None)
        self.spilled += chunk.nbytes
        if chunk.device.type != "cpu":
            return Kept(self, chunk.cpu(), chunk.device, None)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="k5-vae-")
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}"
        # As bytes in memory order, so that any dtype and memory format come back as they were.
        in_order = chunk.permute(*_by_stride(chunk))
        in_order.contiguous().view(torch.uint8).numpy().tofile(path)
        return Kept(self, chunk.new_empty(0).expand(0), chunk.device, (path, tuple(in_order.shape), _by_stride(chunk)))


class Kept:
    """A chunk in a `Storage`."""

    def __init__(
        self,
        storage: Storage,
        tensor: Tensor,
        device: torch.device,
        file: tuple[Path, tuple[int, ...], tuple[int, ...]] | None,
    ) -> None:
        """tensor: the chunk, on its device or on the host; empty where it is in a file. file: path, shape in memory
        order, and the chunk's dimensions in that order."""
        self._storage, self._tensor, self._device, self._file = storage, tensor, device, file

    def read(self) -> Tensor:
        if self._file is None:
            return self._tensor.to(self._device)
        path, shape, order = self._file
        size = torch.Size(shape).numel() * self._tensor.element_size()
        values = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        inverse = [order.index(dimension) for dimension in range(len(order))]
        return values.view(self._tensor.dtype).view(shape).permute(*inverse)

    def drop(self) -> None:
        if self._file is not None:
            self._file[0].unlink()
        elif self._tensor.device == self._device:
            self._storage.held -= self._tensor.nbytes
        self._tensor = self._tensor.new_empty(0)


def _by_stride(chunk: Tensor) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost."""
    return tuple(sorted(range(chunk.ndim), key=chunk.stride, reverse=True))


class Activation:
    """The chunks of one step's output, and the statistics of all of them together."""

    def __init__(self, storage: Storage, groups: int | None) -> None:
        """groups: of the GroupNorm that reads it; None where none does."""
        self.chunks: list[Kept] = []
        self.statistics: GroupStatistics | None = None
        self._storage, self._groups = storage, groups

    def append(self, chunk: Tensor, counts: bool = True) -> None:
        """counts: whether its values are among those that the statistics are of."""
        if self._groups is not None and counts:
            statistics = groupnorm_statistics(chunk, self._groups)
            self.statistics = statistics if self.statistics is None else self.statistics.merge(statistics)
        self.chunks.append(self._storage.keep(chunk))

    def drop(self) -> None:
        for chunk in self.chunks:
            chunk.drop()


def layer_by_layer(
    steps: Sequence[Step],
    chunks: Iterable[Tensor],
    storage: Storage,
    openings: Collection[int] = (),
) -> tuple[list[Tensor], Statistics]:
    """The outputs of the last step, and the statistics that each step normalized by.

    chunks: [B, C, T, H, W] each: consecutive frames of a clip; the outputs equal those of the whole clip at once but
    for rounding. openings: numbers of chunks that do not follow on the one before but begin as a clip of their own,
    and do not count in the statistics.
    """
    x = Activation(storage, steps[0].groups)
    for number, chunk in enumerate(chunks):
        x.append(chunk, number not in openings)
    residual, statistics = None, list[GroupStatistics | None]()
    for number, step in enumerate(steps):
        following = steps[number + 1].groups if number + 1 < len(steps) else None
        out, before = Activation(storage, following), None
        if step.opens_residual:
            residual = x
        for index, kept in enumerate(x.chunks):
            chunk, before = step.run(kept.read(), x.statistics, None if index in openings else before)
            if not step.opens_residual:
                kept.drop()
            if step.shortcut is not None and residual is not None:
                chunk += step.shortcut(residual.chunks[index].read())
                residual.chunks[index].drop()
            out.append(chunk, index not in openings)
        statistics.append(x.statistics)
        x = out
    outputs = [kept.read() for kept in x.chunks]
    x.drop()
    return outputs, statistics


def one_pass(steps: Sequence[Step], chunks: Iterable[Tensor], statistics: Statistics) -> Iterator[Tensor]:
    """The output of the last step for each chunk in turn, by given statistics."""
    state: list[Any] = [None] * len(steps)
    for x in chunks:
        residual = None
        for number, step in enumerate(steps):
            if step.opens_residual:
                residual = x
            x, state[number] = step.run(x, statistics[number], state[number])
            if step.shortcut is not None and residual is not None:
                x += step.shortcut(residual)
                residual = None
        yield x
