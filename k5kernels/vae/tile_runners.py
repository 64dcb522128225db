"""Ways to run the tiles of mode "tile" other than one operator after the other: most tiles have one shape.

    runner = CompiledTiles(encoder)
    encoder.encode(video, "tile", runner=runner)
    runner.seconds       # what compiling took, by the tile's shape

`CompiledTiles` is `torch.compile`. `GraphedTiles` replays a CUDA graph of a tile; it has not run on a GPU yet.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class RunsTiles(Protocol):
    """The encoder or the decoder."""

    def run_tile(self, tile: Tensor) -> Tensor: ...


class CompiledTiles:
    """Compiles at the first tile of a shape. seconds: by shape, that call's time, compiling and one run."""

    def __init__(self, half: RunsTiles, backend: str = "inductor") -> None:
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(
            half.run_tile, fullgraph=True, dynamic=False, backend=backend
        )
        self.seconds: dict[tuple[int, ...], float] = {}

    def __call__(self, tile: Tensor) -> Tensor:
        shape = tuple(tile.shape)
        if shape in self.seconds:
            return self._compiled(tile)
        start = time.perf_counter()
        out = self._compiled(tile)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        self.seconds[shape] = time.perf_counter() - start
        return out


class GraphedTiles:
    """Captures a CUDA graph at the first tile of a shape and dtype and replays it for the others.

    The graphs share one memory pool and keep it; the weights must stay where they are.
    """

    def __init__(self, half: RunsTiles) -> None:
        self._run = half.run_tile
        self._graphs: dict[tuple[torch.Size, torch.dtype], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, tile: Tensor) -> Tensor:
        key = tile.shape, tile.dtype
        if key not in self._graphs:
            self._graphs[key] = self._captured(tile)
        graph, given, made = self._graphs[key]
        given.copy_(tile)
        graph.replay()
        return made.clone()

    def _captured(self, tile: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = tile.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and chosen before the capture
            self._run(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            made = self._run(given)
        return graph, given, made
