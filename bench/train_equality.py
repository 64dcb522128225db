"""Training steps on many processes against the same steps in one: losses, gradients, and NABLA blocks that flip.

    python -m bench.train_equality                               2 and 4 processes
    python -m bench.train_equality --steps 20 --most 8 --out runs/equality.json

The processes are gloo's, in float32, on one thread each. A mesh is replicate × shard × sequence; the batch is the same
for all of them. The loss's difference is the largest of all steps, over the loss. The gradient, of the first step and
before clipping, differs by the L2 norm of the difference over that of the one-process gradient, and so does the clipped
gradient of the last step; the averaged weights, after that step, by the L2 norm over how far the steps have moved them.

A NABLA mask is a choice by scores, and rounding can make it the other way. Blocks that two runs chose differently are
counted, over all steps, layers and heads; from the first of them on the runs are of different masks.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

from bench.gloo_processes import on_processes
from bench.harness import machine
from k5_command import stop_in_one_line
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.attention.nabla import record_block_masks
from k5kernels.block_mask import BlockMask
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import LATENT_CHANNELS, Sample
from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import console, table
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT, Modulation
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.latents import LatentSet
from train.loop import Loop
from train.parallel import Parallel, own_shard, processes, shard_model
from train.schedule import Schedule

CPU = torch.device("cpu")
TEXT_WIDTH, TEXT_TOKENS = 8, 4
MODEL = CrossDiTConfig(
    model_dim=64,
    time_dim=32,
    ff_dim=96,
    text_blocks=1,
    visual_blocks=2,
    axes_dims=(2, 2, 4),
    in_text_dim=TEXT_WIDTH,
    in_text_dim2=TEXT_WIDTH,
)
BATCH, SAMPLES = 4, 6
EVEN, ODD = (2, 32, 32), (3, 18, 26)  # latent grids: 512 tokens in 8 whole blocks, 351 in 12 of which most are smaller
NABLA = AttentionConfig("nabla", 0.6, (1, 1, 1))
CLIP = 0.1  # less than any norm of a gradient here
MESHES = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4), (1, 4, 1), (2, 2, 2), (1, 2, 4))

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """Training on a mesh, (replicate, shard, sequence), of latents of one grid.

    steps: with clipping, AdamW and averages, after a loss and a gradient that are compared by themselves.
    """

    mesh: tuple[int, int, int]
    attention: AttentionConfig
    grid: Grid
    steps: int = 0
    bf16: bool = False

    @property
    def world(self) -> int:
        replicate, shard, sequence = self.mesh
        return replicate * shard * sequence


@dataclass(frozen=True)
class Row:
    """Differences of a case from one process, each relative; see the top of this file. flips: of `blocks`."""

    mesh: str
    attention: str
    tokens: int
    loss: float
    gradient: float | None
    clipped: float | None
    average: float | None
    flips: int
    blocks: int


@dataclass(frozen=True)
class Trained:
    """losses: of each step. gradient: of the first, before clipping. moved: from the first weights to the averaged ones
    after the last step. clipped: the gradient of that step. masks: of each step and layer, bool [B, h, N_b, N_b]."""

    losses: list[float]
    gradient: Tensor
    moved: Tensor | None
    clipped: Tensor | None
    masks: list[Tensor]


def model() -> CrossDiT:
    """Seeded weights with modulations other than zero, which a fresh model has: all of it takes part in a step."""
    torch.manual_seed(0)
    made = CrossDiT(MODEL)
    for module in made.modules():
        if isinstance(module, Modulation):
            torch.nn.init.normal_(module.out_layer.weight, std=0.3)
            torch.nn.init.normal_(module.out_layer.bias, std=0.3)
    made.gradient_checkpointing = True
    return made


def encode_text(captions: list[str]) -> TextCondition:
    """Random tokens by the caption's length, some of them masked."""
    tokens, lengths = [], [len(caption) for caption in captions]
    for length in lengths:
        tokens.append(torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(length)))
    mask = torch.arange(TEXT_TOKENS) <= torch.tensor(lengths)[:, None] % TEXT_TOKENS
    return TextCondition(torch.stack(tokens), mask, torch.stack(tokens).mean(1))


def latents(grid: Grid) -> LatentSet:
    """Random latents of one grid, each with another caption."""
    T, H, W = grid
    generator = torch.Generator().manual_seed(1)
    samples = [
        Sample(
            f"{number}-0",
            torch.randn(LATENT_CHANNELS, *grid, generator=generator).half(),
            ClipRecord(4 * T - 3, 8 * H, 8 * W, Fraction(25), f"{number}.mp4", 0, caption="a" * (number + 1)),
            {},
        )
        for number in range(SAMPLES)
    ]
    return LatentSet(samples, {})


def train(case: Case, parallel: Parallel) -> Trained:
    """The steps of a case, on each process of the mesh."""
    sharded = shard_model(model(), parallel, case.bf16)
    start = _whole(sharded.parameters(), parallel) if case.steps else None
    config = FlowMatching(batch=BATCH, attention=case.attention, ema_decay=0.9, bf16=case.bf16)
    stage = CrossDiTStage(sharded, latents(case.grid), encode_text, config, parallel=parallel)
    schedule = Schedule(max(1, case.steps), warmup_steps=0, max_grad_norm=None)
    loss, masks = _backward(Loop(stage, schedule, parallel))
    gradient = _gradient(sharded, parallel)
    losses = [loss]
    loop = Loop(stage, replace(schedule, max_grad_norm=CLIP), parallel)
    for _ in range(case.steps):
        loss, built = _backward(loop)
        losses.append(loss)
        masks += built
        loop.update()
    moved = clipped = None
    if start is not None:
        moved = _whole(stage.average.tensors.values(), parallel) - start
        clipped = _gradient(sharded, parallel)
    return Trained(losses, gradient, moved, clipped, masks)


def _backward(loop: Loop) -> tuple[float, list[Tensor]]:
    """The loss of the loop's next step, and the masks of its layers."""
    built: list[BlockMask] = []
    with record_block_masks(built.append):
        loss = loop.backward()
    # The backward builds them again, in recomputing the blocks.
    return loss, [_whole_mask(mask, loop.parallel) for mask in built[: MODEL.visual_blocks]]


def compare(case: Case, parallel: Parallel) -> Row:
    """A case against one process, which the first rank alone is; the same row on no other rank."""
    many = train(case, parallel)
    one = _alone(replace(case, mesh=(1, 1, 1))) if parallel.first else many
    pairs = list(zip(many.masks, one.masks, strict=True))
    T, H, W = case.grid
    return Row(
        mesh=" × ".join(map(str, case.mesh)),
        attention=case.attention.engine if case.attention.sparse else "dense",
        tokens=T * H * W // MODEL.patch_cells,
        loss=max(abs(a - b) / abs(b) for a, b in zip(many.losses, one.losses, strict=True)),
        gradient=_relative(many.gradient, one.gradient),
        clipped=_relative(many.clipped, one.clipped),
        average=_relative(many.moved, one.moved),
        flips=sum(int((a != b).sum()) for a, b in pairs),
        blocks=sum(mask.numel() for mask in one.masks),
    )


def compare_all(folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for each case, one after the other, on all ranks of a world of its size."""
    rows = []
    for number, case in enumerate(cases):
        with processes(CPU, *case.mesh, where=f"file://{folder}/{number}") as parallel:
            rows.append(asdict(compare(case, parallel)))
    return rows


def equality(cases: Sequence[Case]) -> list[Row]:
    """A row for each case, in processes started for each world size."""
    rows: dict[Case, dict[str, Any]] = {}
    for world in sorted({case.world for case in cases}):
        fitting = [case for case in cases if case.world == world]
        rows |= dict(zip(fitting, on_processes(world, compare_all, fitting), strict=True))
    return [Row(**rows[case]) for case in cases]


@cache
def _alone(case: Case) -> Trained:
    return train(case, Parallel())


def _whole(tensors: Iterable[Tensor], parallel: Parallel) -> Tensor:
    """All of them in one row, from the shards of the first copy."""
    own = [own_shard(tensor.detach()) for tensor in tensors]
    of_ranks = [own]
    if parallel.world > 1:
        gathered: list[Any] = [None] * parallel.world
        dist.all_gather_object(gathered, own)
        of_ranks = gathered[: parallel.shard * parallel.sequence]
    return torch.cat([torch.cat(shards).flatten() for shards in zip(*of_ranks, strict=True)])


def _gradient(model: nn.Module, parallel: Parallel) -> Tensor:
    return _whole([parameter.grad for parameter in model.parameters() if parameter.grad is not None], parallel)


def _relative(x: Tensor | None, to: Tensor | None) -> float | None:
    """The norm of the difference over that of `to`; None where there are none."""
    if x is None or to is None:
        return None
    return ((x.double() - to.double()).norm() / to.double().norm()).item()


def _whole_mask(mask: BlockMask, parallel: Parallel) -> Tensor:
    """Of all samples of the batch and all heads: bool [B, h, N_b, N_b]."""
    dense = mask.to_dense()
    if parallel.world == 1:
        return dense
    parts = [torch.empty_like(dense) for _ in range(parallel.world)]
    dist.all_gather(parts, dense)
    heads = [
        torch.cat(parts[first : first + parallel.sequence], dim=1)
        for first in range(0, parallel.world, parallel.sequence)
    ]
    return torch.cat(heads)


def _cells(row: Row) -> list[str]:
    differences = [
        "-" if value is None else f"{value:.1e}" for value in (row.loss, row.gradient, row.clipped, row.average)
    ]
    flipped = f"{row.flips} of {row.blocks}" if row.blocks else "-"
    return [row.mesh, row.attention, str(row.tokens), *differences, flipped]


def main(
    steps: Annotated[int, typer.Option(min=0, help="of training, after the gradient that is compared")] = 1,
    most: Annotated[int, typer.Option(min=2, help="processes of the largest mesh")] = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file of the rows")] = None,
) -> None:
    """Print the table."""
    cases = [
        Case(mesh, attention, grid, steps)
        for mesh in MESHES
        for attention, grid in ((DENSE, EVEN), (DENSE, ODD), (NABLA, EVEN), (NABLA, ODD))
    ]
    rows = equality([case for case in cases if case.world <= most])
    header = ["mesh", "attention", "tokens", "loss", "gradient", "clipped", "averages", "blocks flipped"]
    console().print(table(f"{steps} steps against one process", header, [_cells(row) for row in rows]))
    console().print(machine())
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    stop_in_one_line("bench.train_equality")
    typer.run(main)
