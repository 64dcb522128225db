"""How a clip is taken through a half of the VAE: a pure function of sizes, mode and budget (§7.1).

It never asks how much memory is free, so the same call gives the same latents on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig, latent_frames
from k5kernels.vae.sample import WINDOW_FRAMES, WINDOWS, Sample, sample_of
from k5kernels.vae.sizes import StepSize, Volume, decoder_sizes, encoder_sizes
from k5kernels.vae.tiling import Span, Tiling, spans_in_space, spans_in_time

Mode = Literal["exact", "stream", "tile"]
MODES: tuple[str, ...] = get_args(Mode)
# Frames of a chunk, the largest that fit the budget; the first chunk has one frame more where a chunk fills a latent.
CHUNKS = (16, 8, 4, 2, 1)
STREAM_CHUNKS = (8, 4)
# Bytes that `stream` works with in a chunk at most where smaller chunks work with fewer, also without a budget.
STREAM_WORK = 3 * 2**29
MOST_TILES = 16  # along a side
# `stream` takes clips of up to so many frames exactly: its sample of a longer one takes about as much memory.
EXACT_FRAMES = 33
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """half: "encoder" or "decoder". batch, frames, height, width: of the video, sides filled up to multiples of 8.

    together: clips that go through at once. chunks: of video frames, in turn (`exact`, `stream`). times, rows, columns:
    tiles along each axis (`tile`; else one). sample: what `stream` takes its statistics from; None: from the whole
    clip, as `exact`. lookback: latent frames that the attention of `stream` sees, None: all. resident_bytes: of
    activations, of all clips that go together, that stay on the device between two steps; None: all. spilled_bytes: how
    many leave it at the largest step. peak_bytes: estimate of the largest memory beyond weights, video and latents.
    """

    half: str
    mode: Mode
    batch: int
    frames: int
    height: int
    width: int
    together: int
    chunks: tuple[int, ...]
    times: tuple[Span, ...]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    blend: bool
    sample: Sample | None
    lookback: int | None
    resident_bytes: int | None
    spilled_bytes: int
    peak_bytes: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return latent_frames(self.frames), self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE

    def __str__(self) -> str:
        size = f"{self.frames} frames of {self.height} x {self.width}"
        lines = [f"{self.mode}, {self.half}: {self.batch} x {size}, {self.together} at once"]
        if self.mode == "tile":
            counts = " x ".join(str(len(spans)) for spans in (self.times, self.rows, self.columns))
            lines.append(f"{counts} tiles (time, height, width), {'blended' if self.blend else 'not blended'}")
        else:
            lines.append(f"chunks of {_runs(self.chunks)} frames")
        if self.mode == "stream":
            lines.append(f"statistics of {self._sample_in_words()}")
            looks = "all latent frames before" if self.lookback is None else f"the last {self.lookback} latent frames"
            lines.append(f"attention to {looks}")
        if self.spilled_bytes:
            lines.append(f"{self.spilled_bytes / MIB:.0f} MiB of activations leave the device at the largest step")
        return "\n".join([*lines, f"about {self.peak_bytes / MIB:.0f} MiB beyond weights, video and latents"])

    def _sample_in_words(self) -> str:
        if self.sample is None:
            return "the whole clip"
        return "frames " + ", ".join(f"{first} to {end - 1}" for first, end in self.sample.windows())

    def drawing(self) -> str:
        """Each axis as a line a tile: a letter or digit a latent, # where the tile gives it, - where it is left out."""
        axes = (("time", self.times), ("height", self.rows), ("width", self.columns))
        lines = []
        for name, spans in axes:
            lines.append(f"{name} ({spans[-1].stop} latents)")
            for number, span in enumerate(spans):
                alone = name == "time" and number > 0
                lines.append(" " * span.start + "-" * alone + "#" * (span.stop - span.start - alone))
        return "\n".join(lines)


def plan(
    config: VAEConfig,
    half: Literal["encoder", "decoder"],
    shape: Sequence[int],
    mode: Mode,
    memory_budget: int | None = None,
    value_bytes: int = 4,
    tiling: Tiling = Tiling(),
    lookback: int | None = None,
) -> Plan:
    """shape: (batch, frames, height, width) of the video, sides multiples of 8, frames 1 + a multiple of 4.

    memory_budget: bytes for activations on the device, beyond weights, video and latents; None: no limit, and clips go
    one by one. value_bytes: of a value of an activation.
    Raises ValueError for a mode that does not exist and where the budget is too small, with the least that works.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if lookback is not None and (mode != "stream" or lookback < 1):
        raise ValueError(f"lookback: expected at least 1 frame, in mode stream, got {lookback} in mode {mode}")
    batch, frames, height, width = shape
    sizes = encoder_sizes(config) if half == "encoder" else decoder_sizes(config)
    volume, latents = Volume(frames, height, width), latent_frames(frames)
    lengths = latents, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
    tiles: tuple[tuple[Span, ...], ...] = tuple((Span(0, length),) for length in lengths)
    sample, resident, spilled = None, None, 0
    chunks: tuple[int, ...] = (frames,)
    if mode == "tile":
        tiles, peak = _tiles(sizes, volume, memory_budget, value_bytes, tiling)
    elif mode == "stream" and frames > EXACT_FRAMES:
        chunk, resident, spilled, peak = _stream_chunk(sizes, volume, memory_budget, value_bytes, lookback)
        chunks = chunk_sizes(frames, chunk)
        sample = sample_of(frames, chunk)
    else:
        least = 1 if half == "encoder" else TEMPORAL_STRIDE
        choices = tuple(chunk for chunk in (CHUNKS if mode == "exact" else STREAM_CHUNKS) if chunk >= least)
        work = None if mode == "exact" else STREAM_WORK
        chunk, resident, spilled, peak = _exact_chunk(sizes, volume, memory_budget, value_bytes, choices, work)
        chunks = chunk_sizes(frames, chunk)
    times, rows, columns = tiles
    together = 1
    if memory_budget is not None and not spilled:
        together = max(1, min(batch, memory_budget // max(peak, 1)))
    return Plan(
        half, mode, batch, frames, height, width, together,
        chunks, times, rows, columns, tiling.blend, sample, lookback,
        None if resident is None else together * resident, together * spilled, together * peak,
    )  # fmt: skip


def chunk_sizes(frames: int, chunk: int) -> tuple[int, ...]:
    """`frames` frames in chunks of `chunk`; the first has one more where that fills its latents."""
    first = min(frames, chunk + (chunk % TEMPORAL_STRIDE == 0))
    whole, rest = divmod(frames - first, chunk)
    return (first, *[chunk] * whole, *[rest] * (rest > 0))


def _exact_chunk(
    sizes: list[StepSize],
    volume: Volume,
    budget: int | None,
    value_bytes: int,
    choices: tuple[int, ...],
    most_work: int | None,
) -> tuple[int, int | None, int, int]:
    """Chunk, bytes that stay, bytes that leave, peak. The largest chunk is taken that works with no more than
    `most_work` and leaves half of the budget to activations; where not even the smallest one does, that one."""
    for chunk in choices:
        last = chunk == choices[-1]
        if most_work is not None and not last and value_bytes * _most_work(sizes, volume, chunk) > most_work:
            continue
        resident, spilled, peak = _layer_by_layer(sizes, volume, budget, value_bytes, chunk)
        if resident is None or budget is None or peak - resident <= budget // 2 or (last and peak <= budget):
            return chunk, resident, spilled, peak
    raise ValueError(_too_small(budget, peak))


def _layer_by_layer(
    sizes: list[StepSize], volume: Volume, budget: int | None, value_bytes: int, chunk: int
) -> tuple[int | None, int, int]:
    """Bytes that stay on the device between two steps (None: all), bytes that leave it, peak: more than the budget
    where not even a chunk fits."""
    peak = value_bytes * max(_held(size, volume) + _work(size, volume, chunk) for size in sizes)
    if budget is None or peak <= budget:
        return None, 0, peak
    held = value_bytes * max(_held(size, volume) for size in sizes)
    work = value_bytes * max(_work(size, volume, chunk) + _read(size, volume, chunk) for size in sizes)
    resident = max(0, budget - work)
    return resident, held - resident, resident + work


def _stream_chunk(
    sizes: list[StepSize], volume: Volume, budget: int | None, value_bytes: int, lookback: int | None
) -> tuple[int, int | None, int, int]:
    """Chunk; of the sample, bytes that stay and bytes that leave; peak of the sample and of the pass by its
    statistics."""
    seen = volume if lookback is None else Volume(min(volume.frames, 4 * lookback), volume.height, volume.width)
    kept = 2 * sum(seen.values(size.channels_in, size.resolution_in) for size in sizes if size.attention)
    for size in sizes:  # what convolutions keep of the chunk before
        time, _ = size.resolution_in
        kept += volume.values(size.channels_in, size.resolution_in, (size.taps - 1) * time)
    sampled = Volume(WINDOWS * WINDOW_FRAMES, volume.height, volume.width)
    for chunk in STREAM_CHUNKS:
        last = chunk == STREAM_CHUNKS[-1]
        if not last and value_bytes * _most_work(sizes, volume, chunk) > STREAM_WORK:
            continue
        work = max(_work(size, volume, chunk) + _read(size, volume, chunk) for size in sizes)
        peak = value_bytes * (kept + work)
        resident, spilled, of_sample = _layer_by_layer(sizes, sampled, budget, value_bytes, chunk)
        peak = max(peak, of_sample)
        if budget is None or peak <= budget:
            return chunk, resident, spilled, peak
    raise ValueError(_too_small(budget, peak))


def _tiles(
    sizes: list[StepSize], volume: Volume, budget: int | None, value_bytes: int, tiling: Tiling
) -> tuple[tuple[tuple[Span, ...], tuple[Span, ...], tuple[Span, ...]], int]:
    """The fewest tiles in space that fit the budget, along the longer side first."""
    times = spans_in_time(latent_frames(volume.frames), tiling)
    sides = volume.height // SPATIAL_STRIDE, volume.width // SPATIAL_STRIDE
    overlap = tiling.overlap // SPATIAL_STRIDE
    counts = sorted(
        ((rows, columns) for rows in range(1, MOST_TILES + 1) for columns in range(1, MOST_TILES + 1)),
        key=lambda count: (count[0] * count[1], abs(sides[0] * count[1] - sides[1] * count[0]), count),
    )
    least = None
    for count in counts:
        try:
            rows, columns = (spans_in_space(side, n, overlap) for side, n in zip(sides, count, strict=True))
        except ValueError:
            continue  # too many for this side
        frames = 1 + TEMPORAL_STRIDE * (times[0].stop - 1)
        tile = Volume(frames, *(SPATIAL_STRIDE * spans[0].stop for spans in (rows, columns)))
        peak = value_bytes * max(_of_a_tile(size, tile) for size in sizes)
        if budget is None or peak <= budget:
            return (times, rows, columns), peak
        least = peak if least is None else min(least, peak)
    raise ValueError(_too_small(budget, least))


def _held(size: StepSize, volume: Volume) -> int:
    """Values of the whole activations that a step has before and after it."""
    before = volume.values(size.channels_in, size.resolution_in)
    residual = volume.values(size.residual, size.resolution_in)
    after = volume.values(size.channels_out, size.resolution_out)
    keys_and_values = 2 * before if size.attention else 0
    return keys_and_values + max(before + residual + (after if _opens_residual(size) else 0), after)


def _of_a_tile(size: StepSize, tile: Volume) -> int:
    """Values that are there while a step takes a whole tile: what is kept for the residual, its input or its output,
    and its input padded."""
    before, after = (
        tile.values(size.channels_in, size.resolution_in),
        tile.values(size.channels_out, size.resolution_out),
    )
    padded = before + tile.values(size.channels_in, size.resolution_in, (size.taps - 1) * size.resolution_in[0])
    keys_and_values = 2 * before if size.attention else 0
    if _opens_residual(size):
        return before + padded + after
    shortcut = after if size.residual not in (0, size.channels_out) else 0
    return keys_and_values + tile.values(size.residual, size.resolution_in) + padded + max(before, after + shortcut)


def _opens_residual(size: StepSize) -> bool:
    return size.residual == 0 and size.taps > 1 and size.resolution_in == size.resolution_out


def _work(size: StepSize, volume: Volume, chunk: int) -> int:
    """Values that a step works with while it takes a chunk, beyond its input: that padded, its output, and what it
    has of the chunk before and keeps for the next."""
    time, _ = size.resolution_in
    padded = volume.values(size.channels_in, size.resolution_in, chunk + 3 * (size.taps - 1) * time)
    written = volume.values(size.channels_out, size.resolution_out, chunk)
    shortcut = written if size.residual not in (0, size.channels_out) else 0
    return padded + written + shortcut


def _most_work(sizes: list[StepSize], volume: Volume, chunk: int) -> int:
    return max(_work(size, volume, chunk) for size in sizes)


def _read(size: StepSize, volume: Volume, chunk: int) -> int:
    """Values of a step's input, and of the residual that is added to its output, for a chunk."""
    return volume.values(size.channels_in + size.residual, size.resolution_in, chunk)


def _too_small(budget: int | None, needed: int | None) -> str:
    return f"memory_budget: expected at least {needed} bytes for this size, got {budget}; or give none"


def _runs(chunks: Sequence[int]) -> str:
    """ "17, 3 times 16 and 4" """
    parts = [f"{count} times {size}" if count > 1 else f"{size}" for size, count in _counted(chunks)]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _counted(chunks: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, len(list(run))) for size, run in groupby(chunks)]
