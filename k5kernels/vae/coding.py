"""Takes a clip through a half of the VAE as a plan says (§7.1)."""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from k5kernels.vae.passes import Storage, layer_by_layer, one_pass
from k5kernels.vae.plan import Plan
from k5kernels.vae.sample import statistics_of_sample
from k5kernels.vae.steps import Step
from k5kernels.vae.tiling import Span, space_weights, time_weights

# Of a clip or tile [B, C, T, H, W], the last step's output.
Whole = Callable[[Tensor], Tensor]


def run_plan(plan: Plan, steps: list[Step], clip: Tensor, whole: Whole) -> Tensor:
    """The last step's output for a clip [B, C, T, H, W]: video for an encoder, latents for a decoder.

    whole: runs a tile.
    """
    parts = []
    for part in clip.split(plan.together):
        if plan.mode == "tile":
            parts.append(_tiles(plan, part, whole))
        elif plan.sample is not None:
            sample = plan.sample if plan.half == "encoder" else plan.sample.in_latents()
            statistics = statistics_of_sample(steps, part, sample, plan.resident_bytes)
            parts.append(torch.cat(list(one_pass(steps, chunks_of(plan, part), statistics)), dim=2))
        else:
            with Storage(plan.resident_bytes) as storage:
                parts.append(torch.cat(layer_by_layer(steps, chunks_of(plan, part), storage)[0], dim=2))
    return torch.cat(parts)


def chunks_of(plan: Plan, clip: Tensor) -> Iterator[Tensor]:
    """The plan's chunks of a clip; of latents where it plans a decoder."""
    ends = [0, *accumulate(plan.chunks)]
    for first, end in pairwise(ends):
        frames = slice(first, end)
        if plan.half == "decoder":
            frames = slice(*(-(-frame // TEMPORAL_STRIDE) for frame in (first, end)))
        yield clip[:, :, frames].contiguous(memory_format=torch.channels_last_3d)


def _tiles(plan: Plan, clip: Tensor, whole: Whole) -> Tensor:
    """Tiles, each by its own statistics, joined with weights that sum to 1."""
    encodes = plan.half == "encoder"
    axes = (plan.times, plan.rows, plan.columns)
    if encodes:
        sources = [[span.frames() for span in plan.times], *([span.pixels() for span in axis] for axis in axes[1:])]
        targets = [[span.latents() for span in axis] for axis in axes]
    else:
        sources = [[span.latents() for span in axis] for axis in axes]
        targets = [[span.frames() for span in plan.times], *([span.pixels() for span in axis] for axis in axes[1:])]
    spans = [tuple(Span(target.start, target.stop) for target in axis) for axis in targets]
    weights = [time_weights(spans[0], plan.blend), *(space_weights(axis, plan.blend) for axis in spans[1:])]
    out = None
    for t, y, x in ((t, y, x) for t in range(len(axes[0])) for y in range(len(axes[1])) for x in range(len(axes[2]))):
        tile = clip[:, :, sources[0][t], sources[1][y], sources[2][x]]
        result = whole(tile.contiguous(memory_format=torch.channels_last_3d))
        if out is None:
            out = result.new_zeros(*result.shape[:2], *(axis[-1].stop for axis in spans))
        along = (result.new_tensor(of_axis[n]) for of_axis, n in zip(weights, (t, y, x), strict=True))
        time, height, width = along
        weight = time[:, None, None] * height[:, None] * width
        out[:, :, targets[0][t], targets[1][y], targets[2][x]] += result * weight
    assert out is not None  # an axis has a tile at least
    return out


def fill_up(video: Tensor) -> Tensor:
    """The video [B, C, F, H, W] with its sides filled up to multiples of 8 by reflection, at the bottom and the right:
    the row beyond the last is the one before the last. A side too short to reflect is reflected again and again."""
    for dimension in (3, 4):
        side = video.shape[dimension]
        if missing := -side % SPATIAL_STRIDE:
            places = torch.arange(side + missing, device=video.device)
            period = max(1, 2 * side - 2)
            places = (places % period - period * (places % period >= side)).abs()
            video = video.index_select(dimension, places)
    return video
