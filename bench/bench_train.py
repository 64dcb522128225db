"""A step of the trainer: NABLA against dense attention, offload against none, and what its data take."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from bench.harness import compare
from bench.memory_trace import Trace, figures, small_model, step_of, trace
from bench.shaped_training import SMALL_RATE, shaped_loop
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.attention.nabla import record_block_masks
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample
from k5kernels.offload import ActivationOffload
from k5kernels.offload.disk import DiskSlot, DiskStore
from k5kernels.presets import CrossDiTConfig
from k5kernels.text_encoders import MiniLMTextEncoder
from model.crossdit import CrossDiT
from model.presets import PRESETS
from train.building import SMALLEST_OFFLOADED
from train.crossdit_stage import CrossDiTStage, Drawn, FlowMatching
from train.latents import LatentSet
from train.loop import Loop
from train.schedule import Schedule

T = TypeVar("T")
ROUNDS = 5
CPU = torch.device("cpu")

# Seven heads as in a quarter of Lite, and so many tokens that attention is most of a dense step, as it is in the
# report's stages that train with NABLA.
TEXT_DIM = 64
QUARTER = CrossDiTConfig(448, 128, 1792, 1, 2, (16, 24, 24), in_text_dim=TEXT_DIM, in_text_dim2=TEXT_DIM)
SHORT, LONG = (3, 16, 24), (16, 16, 24)  # tokens of a clip
THRESHOLDS = (0.5, 0.6, 0.66, 0.72, 0.8)
DENSITY = 0.2  # wanted
FASTER = 1.46  # the report's, of a model of 2B at 512² pixels

SLOWEST = 1 / 1.10  # of a step with offload, against one without
LIMIT, SHARE_OF_LIMIT = "kept, as many bytes written beside", 0.9
MOST_RESIDENT = 3  # block inputs at a time
LARGEST_PEAK_ALONE = 0.8  # without checkpointing, of the peak without offload

NANO_GRID = (3, 32, 48)  # of latents, as of nine frames at 256×384
CAPTION = "a large rabbit stands in a green meadow in front of its burrow, stretches and looks at a butterfly"
DATA_IN_STEP = 20.0  # how many times as long the step takes


def test_nabla_step(benchmark):
    """A step of the loop, with clipping, AdamW and the average; the same code but for the attention."""
    every_block, dense = (loop(SHORT, attention) for attention in (AttentionConfig("nabla", 1.0), DENSE))
    for _ in range(2):
        assert every_block.step() == pytest.approx(dense.step(), rel=1e-4)
    densities = {thr: density(loop(LONG, AttentionConfig("nabla", thr))) for thr in THRESHOLDS}
    thr = min(densities, key=lambda thr: abs(densities[thr] - DENSITY))
    assert densities[thr] == pytest.approx(DENSITY, abs=0.05), densities
    nabla, dense = loop(LONG, AttentionConfig("nabla", thr)), loop(LONG, DENSE)
    expected = dense.step()

    def check(loss: float) -> None:
        assert loss == pytest.approx(expected, rel=0.2)  # of other noise and times each

    T, H, W = LONG
    compare(
        benchmark,
        f"{QUARTER.visual_blocks} blocks of width {QUARTER.model_dim}, S {T * H * W}, float32, checkpointed, density "
        f"{densities[thr]:.1%}",
        {"NABLA": nabla.step, "dense": dense.step},
        check,
        floors={"dense": FASTER},
        rounds=ROUNDS,
    )


def loop(clip: tuple[int, int, int], attention: AttentionConfig) -> Loop:
    return shaped_loop(QUARTER, clip, CPU, attention, learning_rate=SMALL_RATE)


@torch.no_grad()
def density(loop: Loop) -> float:
    """Of the masks of all blocks, in the loop's first step."""
    found: list[float] = []
    with record_block_masks(lambda mask: found.append(mask.density)):
        loop.stage.loss(0, torch.Generator().manual_seed(0))
    return fmean(found)


@pytest.mark.parametrize(("blocks", "checkpointing"), [(16, True), (4, False)], ids=["checkpointed", "alone"])
def test_offload(benchmark, tmp_path, monkeypatch, blocks, checkpointing):
    """Step time with what the blocks save in a file, against kept; and the memory both hold.

    Without checkpointing so much is saved that writing it, on processors that compute meanwhile, takes about all that
    the floor would allow: there the limit is the step with all kept beside a thread that only writes as much.
    """
    model = small_model(blocks)
    model.gradient_checkpointing = checkpointing
    step = step_of(model)
    offload = ActivationOffload(tmp_path, min_bytes=SMALLEST_OFFLOADED)

    def run(away: ActivationOffload | None) -> list[Tensor]:
        model.offload = away
        step()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = [gradient.clone() for gradient in run(None)]

    def check(gradients: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))

    kept, offloaded = traces(model, step, offload)
    found = figures(kept, offloaded, model)
    benchmark.extra_info.update(found)
    words = f"{blocks} blocks, {found['tokens']} tokens, width {found['model_dim']}"
    variants: dict[str, Callable[[], list[Tensor]]] = {"offload": partial(run, offload), "kept": partial(run, None)}
    saved, peak = found["saved_block_inputs"], found["peak_share"]
    if checkpointing:
        words += f", checkpointed: {saved} block inputs saved, peak {peak:.0%}"
        compare(benchmark, words, variants, check, floors={"kept": SLOWEST}, rounds=ROUNDS)
        assert saved >= blocks - MOST_RESIDENT
    else:
        sizes = moved_sizes(partial(run, offload), monkeypatch)
        words += f", not checkpointed: {sum(sizes) / 1e6:.0f} MB moved, peak {peak:.0%}"
        variants[LIMIT] = beside_writing(partial(run, None), sizes, tmp_path)
        compare(benchmark, words, variants, check, floors={LIMIT: SHARE_OF_LIMIT}, rounds=ROUNDS)
        assert peak <= LARGEST_PEAK_ALONE


def moved_sizes(step: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each tensor that a step with offload moves."""
    sizes: list[int] = []
    put = DiskStore.put

    def noting(store: DiskStore, tensor: Tensor) -> DiskSlot | None:
        sizes.append(tensor.nbytes)
        return put(store, tensor)

    with monkeypatch.context() as watched:
        watched.setattr(DiskStore, "put", noting)
        step()
    return sizes


def beside_writing(step: Callable[[], T], sizes: list[int], folder: Path) -> Callable[[], T]:
    """The step, while a thread writes a file in pieces of these sizes, each once."""
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as the benchmark
    pieces = [torch.ones(size, dtype=torch.uint8).numpy() for size in sizes]

    def write() -> None:
        offset = 0
        for piece in pieces:
            offset += os.pwrite(file.fileno(), piece.data, offset)
        assert offset == sum(sizes)

    def run() -> T:
        with ThreadPoolExecutor(1) as worker:
            writing = worker.submit(write)
            result = step()
            writing.result()
        return result

    return run


def test_data(benchmark):
    """What a step's batch takes, drawn and its captions encoded, beside a step of nano."""
    data = latents(NANO_GRID)
    torch.manual_seed(0)
    model = CrossDiT(PRESETS["nano"])
    model.gradient_checkpointing = True
    stage = CrossDiTStage(model, data, MiniLMTextEncoder(CPU).encode, FlowMatching(batch=2, learning_rate=SMALL_RATE))
    steps = Loop(stage, Schedule(1 << 20))

    def draw() -> Drawn:
        return stage.draw(torch.Generator().manual_seed(0))

    def check(result: Drawn | float) -> None:
        if isinstance(result, Drawn):
            assert result.batch.latents.shape == (2, *NANO_GRID, stage.model.config.in_visual_dim)
            assert result.text.tokens.shape[::2] == (2, stage.model.config.in_text_dim)
        else:
            assert 0 < result < 10

    T, H, W = NANO_GRID
    words = f"2 samples of {T * H * W // 4} tokens, {len(CAPTION.split())} words each"
    compare(benchmark, words, {"data": draw, "step": steps.step}, check, floors={"step": DATA_IN_STEP}, rounds=ROUNDS)


def latents(grid: tuple[int, int, int]) -> LatentSet:
    """Some of noise, captioned."""
    T, H, W = grid
    made = []
    for number in range(8):
        noise = torch.randn(16, *grid, generator=torch.Generator().manual_seed(number)).half()
        record = ClipRecord(4 * T - 3, 8 * H, 8 * W, Fraction(24), f"{number}.mp4", 0, caption=f"{CAPTION} {number}")
        made.append(Sample(f"{number}-0", noise, record))
    return LatentSet(made, {})


def traces(model: CrossDiT, step: Callable[[], Tensor], offload: ActivationOffload) -> tuple[Trace, Trace]:
    """The memory of a step with block inputs kept, and with offload."""
    model.offload = None
    kept = trace("checkpointing", step)
    model.offload = offload
    return kept, trace("checkpointing with offload", step)
