"""How x [B, C, ...] is shared among programs: tiles of positions and channels, in the order they have in memory.

P positions of a sample are cut into runs of some tiles. What a run sums up over its positions it writes for each
channel, and these parts are added in their order: two calls give the same bits. How positions are cut depends on the
sizes alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from k5kernels.memory_format import memory_format_like

VALUES = 4096  # of each tensor, held by a program at a time
CHANNELS = 256  # of a tile, at most
WARPS = 8
STAGES = 3  # tiles in flight
ELEMENTWISE_TILES = 8  # of a run: what it loads for each channel is loaded once for so many
SUMMED_RUNS = 1024  # of all samples and channels: enough for every multiprocessor


@dataclass(frozen=True)
class Tiles:
    """Of x [B, C, P] or [B, P, C]. steps: elements from a position to the next, and from a channel to the next.

    length: positions of a run; the last one of a sample may be shorter. runs: of one sample and one block of channels.
    """

    samples: int
    positions: int
    channels: int
    steps: tuple[int, int]
    tile: tuple[int, int]
    length: int
    runs: int

    @property
    def programs(self) -> int:
        return self.samples * triton.cdiv(self.channels, self.tile[1]) * self.runs

    @property
    def arguments(self) -> tuple[int, ...]:
        """What a kernel gives to `run_of_program` and to `addresses`."""
        return self.positions, self.channels, self.length, self.runs, *self.steps

    @property
    def constants(self) -> dict[str, Any]:
        return {"POSITIONS": self.tile[0], "CHANNELS": self.tile[1], "STAGES": STAGES, "num_warps": WARPS}


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps in memory, in the format of results for `like` (x itself)."""
    return x.contiguous(memory_format=memory_format_like(x if like is None else like))


def empty_result(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format_like(x))


def elementwise_tiles(x: Tensor) -> Tiles:
    """For a kernel that writes a value for each value. x: `dense`."""
    return _tiles(*_sizes(x), ELEMENTWISE_TILES)


def summing_tiles(x: Tensor) -> Tiles:
    """For a kernel that sums up over positions, for each channel. x: `dense`."""
    return _tiles(*_sizes(x), None)


def group_tiles(x: Tensor, groups: int) -> Tiles:
    """For a kernel that sums up over positions and groups: a group of a contiguous x is one channel of many
    positions."""
    samples, positions, channels, channels_last = _sizes(x)
    if channels_last:
        return summing_tiles(x)
    return _tiles(samples * groups, channels // groups * positions, 1, True, None)


def _sizes(x: Tensor) -> tuple[int, int, int, bool]:
    channels_last = memory_format_like(x) != torch.contiguous_format
    return x.shape[0], math.prod(x.shape[2:]), x.shape[1], channels_last


def _tiles(samples: int, positions: int, channels: int, channels_last: bool, tiles_of_run: int | None) -> Tiles:
    if channels_last:
        wide = min(CHANNELS, VALUES, triton.next_power_of_2(channels))
        long = VALUES // wide
    else:
        long = min(VALUES, triton.next_power_of_2(positions))
        wide = min(VALUES // long, triton.next_power_of_2(channels))
    if tiles_of_run is None:
        runs = max(1, SUMMED_RUNS // (samples * triton.cdiv(channels, wide)))
        tiles_of_run = triton.cdiv(triton.cdiv(positions, runs), long)
    length = tiles_of_run * long
    steps = (channels, 1) if channels_last else (1, positions)
    return Tiles(samples, positions, channels, steps, (long, wide), length, triton.cdiv(positions, length))


@triton.jit
def run_of_program(positions, channels, length, runs, CHANNELS: tl.constexpr):
    """The sample of this program's run, its number, its first position and its end, and its channels."""
    program = tl.program_id(0)
    run = program % runs
    blocks = (channels + CHANNELS - 1) // CHANNELS
    channel = program // runs % blocks * CHANNELS + tl.arange(0, CHANNELS)
    start = run * length
    return (program // runs // blocks).to(tl.int64), run, start, tl.minimum(positions, start + length), channel


@triton.jit
def addresses(sample, position, channel, positions, channels, step_p, step_c):
    """Offsets of a tile of a dense tensor: int64 [POSITIONS, CHANNELS]."""
    places = position.to(tl.int64)[:, None] * step_p + channel.to(tl.int64)[None, :] * step_c
    return sample * positions * channels + places


@triton.jit
def load_of_groups(values, sample, channel, channels, groups):
    """float64 [B, G] of the groups that some channels belong to, float32 [1, CHANNELS]."""
    group = channel // (channels // groups)
    return tl.load(values + sample * groups + group, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_of_channels(values, channel, channels):
    """[C], float32 [1, CHANNELS]."""
    return tl.load(values + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
