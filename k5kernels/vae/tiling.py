"""Tiles of a clip: which latents each one gives, and with what weight where tiles overlap (§7.1).

Everything is counted in latents: along time one for the first frame and one for every four after it, along height and
width one for 8 pixels. The first latent of a tile in time stands for one frame alone. Only in the first tile is that
what the clip has there, so later tiles begin one latent early and that one is left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, whole_latent_frames


class Span(NamedTuple):
    """Latents start to stop - 1 of one axis."""

    start: int
    stop: int

    def frames(self) -> slice:
        """The video frames of these latents in time."""
        return slice(TEMPORAL_STRIDE * self.start, TEMPORAL_STRIDE * (self.stop - 1) + 1)

    def pixels(self) -> slice:
        """The pixels of these latents along height or width."""
        return slice(SPATIAL_STRIDE * self.start, SPATIAL_STRIDE * self.stop)

    def latents(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Tiling:
    """frames: of a tile, 1 + a multiple of 4. stride: frames from one tile to the next, a multiple of 4.

    blend: whether tiles fade into each other where they overlap; else a tile in time keeps all it has, and tiles in
    space meet in the middle. overlap: pixels that tiles in space share, a multiple of 8. In space a frame is one tile
    unless that takes more memory than the budget.
    The default makes least work. Raises ValueError where a number does not fit.
    """

    frames: int = 17
    stride: int = 16
    blend: bool = False
    overlap: int = 64

    def __post_init__(self) -> None:
        if not whole_latent_frames(self.frames) or self.frames == 1:
            raise ValueError(f"frames: expected 5, 9, 13, … frames of a tile, got {self.frames}")
        if self.stride % TEMPORAL_STRIDE or not self.frames // 2 <= self.stride < self.frames:
            raise ValueError(
                f"stride: expected a multiple of {TEMPORAL_STRIDE} from half of a tile's {self.frames} frames up to "
                f"{self.frames - 1}, got {self.stride}"
            )
        if self.overlap < SPATIAL_STRIDE or self.overlap % SPATIAL_STRIDE:
            raise ValueError(f"overlap: expected a positive multiple of {SPATIAL_STRIDE} pixels, got {self.overlap}")


# How the latents were made that Kandinsky 5 learned from, at frames of up to 900 x 900 pixels.
KANDINSKY_TILING = Tiling(frames=17, stride=8, blend=True)


def spans_in_time(latents: int, tiling: Tiling) -> tuple[Span, ...]:
    """Tiles of `tiling.frames` frames, the last one shorter where the clip ends."""
    length, stride = 1 + (tiling.frames - 1) // TEMPORAL_STRIDE, tiling.stride // TEMPORAL_STRIDE
    spans = [Span(0, min(length, latents))]
    while spans[-1].stop < latents:
        start = spans[-1].start + stride
        spans.append(Span(start, min(start + length, latents)))
    return tuple(spans)


def spans_in_space(latents: int, tiles: int, overlap: int) -> tuple[Span, ...]:
    """`tiles` tiles of one size, evenly spread, that share at least `overlap` latents with their neighbours.

    Raises ValueError where tiles would be more than half overlap.
    """
    length = -(-(latents + (tiles - 1) * overlap) // tiles)
    if tiles > 1 and (length < 2 * overlap or length >= latents):
        raise ValueError(f"tiles: expected fewer than {tiles} along {latents} latents with an overlap of {overlap}")
    starts = [0] if tiles == 1 else [round(i * (latents - length) / (tiles - 1)) for i in range(tiles)]
    return tuple(Span(start, start + length) for start in starts)


def time_weights(spans: tuple[Span, ...], blend: bool) -> list[list[float]]:
    """Of each latent of each tile in time; over the tiles they sum to 1 for every latent of the clip."""
    weights = [[1.0] * (span.stop - span.start) for span in spans]
    for number in range(1, len(spans)):
        weights[number][0] = 0.0
        _join(weights, spans, number, spans[number].start + 1, blend, cut=spans[number - 1].stop)
    return weights


def space_weights(spans: tuple[Span, ...], blend: bool) -> list[list[float]]:
    """Of each latent of each tile along height or width; over the tiles they sum to 1 for every latent of a frame."""
    weights = [[1.0] * (span.stop - span.start) for span in spans]
    for number in range(1, len(spans)):
        begin = spans[number].start
        _join(weights, spans, number, begin, blend, cut=(begin + spans[number - 1].stop) // 2)
    return weights


def _join(weights: list[list[float]], spans: tuple[Span, ...], number: int, begin: int, blend: bool, cut: int) -> None:
    """Share latents from `begin` to the end of the tile before between that tile and tile `number`, from the first all
    of the tile before to nearly all of the next, or from `cut` on all of the next."""
    before, after = spans[number - 1], spans[number]
    for latent in range(begin, before.stop):
        share = (latent - begin) / (before.stop - begin) if blend else float(latent >= cut)
        weights[number - 1][latent - before.start] *= 1 - share
        weights[number][latent - after.start] *= share
