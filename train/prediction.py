"""What the planner says of a run of this trainer, before it runs and beside what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from k5kernels.planner import HardwareProfile, ModelShape, memory_terms, step_time_terms
from k5kernels.planner.candidates import Problem
from k5kernels.planner.extensions import Extensions
from k5kernels.planner.search import NothingFitsError, search
from k5kernels.planner.shapes import PATCH, TOKEN_PIXELS, ClipShape
from k5kernels.planner.workload import Workload
from k5kernels.presets import CrossDiTConfig
from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from model.crossdit import CrossDiT
from train.crossdit_stage import FlowMatching

GIB = 2**30
LOADED_BYTES = 0.07 * GIB  # by PyTorch with the first step, set to measured runs like the two below
KEPT_OF_ACTIVATIONS, KEPT_OF_GRADIENTS = 1.5, 2.0  # by glibc, of what it was given back
MOST_GPUS = 1024  # of the search for a layout that fits
BATCH_TOLERANCE = 1e-6  # the clips of a step are the run's, exactly

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """What decides the time and the memory of a step.

    grids: latent [T, H, W] -> how many samples have it. density: of NABLA's masks, 1 with dense attention.
    """

    model: CrossDiTConfig
    training: FlowMatching
    grids: Mapping[Grid, int]
    checkpointing: bool
    density: float = 1.0

    @property
    def shape(self) -> ModelShape:
        """The model as the formulas take it."""
        return ModelShape.of(self.model)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process with the whole model, beside what it holds before there is a model.

    loaded: code that PyTorch loads with the first step. states: float32 weights, both moments and the running average.
    gradients: float32. block_inputs: kept for recomputation. block_activations: what one block keeps, or all blocks
    without checkpointing (both as the report counts them, §7.3.2). backward: gradients inside a block, largest at its
    MLP. allocator: what glibc keeps between tensors of different sizes instead of giving it back, by a rule fitted to
    measured runs; giving all back would make a step half as long again. Activations are of the largest grid; float32
    unless the run is bf16.
    """

    loaded: float
    states: float
    gradients: float
    block_inputs: float
    block_activations: float
    backward: float
    allocator: float

    @property
    def total(self) -> float:
        """The peak: block by block, the backward frees inputs and fills gradients, so that the larger of both counts.

        The report's formula leaves out what one block keeps where the gradients are larger: over 64 shards they are
        not, here they often are.
        """
        held = max(self.gradients, self.block_inputs)
        return self.loaded + self.states + held + self.block_activations + self.backward + self.allocator


def tokens(run: Run, grid: Grid) -> int:
    """Visual tokens of one sample of the grid, cut to the run's latent frames."""
    frames = min(grid[0], run.training.latent_frames or grid[0])
    return frames * (grid[1] // PATCH) * (grid[2] // PATCH)


def predicted_ms(run: Run, profile: HardwareProfile) -> float:
    """Time of a step in ms, mean over the grids by their samples; the density scales attention."""
    total = 0.0
    for grid, samples in run.grids.items():
        pixels = tokens(run, grid) * TOKEN_PIXELS
        terms = step_time_terms(run.shape.model_dim, pixels, run.shape.blocks, run.training.batch, profile)
        total += samples * (terms.total_ms - (1 - run.density) * terms.attention_ms)
    return total / sum(run.grids.values())


def predicted_memory(run: Run) -> Memory:
    """Memory of a step, see `Memory`."""
    shape, c = run.shape, run.model
    weights = _parameters(c)
    largest = run.training.batch * max(tokens(run, grid) for grid in run.grids)
    terms = memory_terms(
        shape.model_dim, shape.time_dim, shape.ff_dim, shape.blocks, largest, gpus=1, offload=not run.checkpointing
    )
    width = 1 if run.training.bf16 else 2  # the formula's activations are bfloat16
    gradients = 4.0 * weights
    of_blocks = width * terms.block_activations_bytes * (1 if run.checkpointing else shape.blocks)
    backward = 2.0 * width * largest * (2 * c.model_dim + c.ff_dim)
    return Memory(
        loaded=LOADED_BYTES,
        states=16.0 * weights,
        gradients=gradients,
        block_inputs=width * terms.block_inputs_bytes,
        block_activations=of_blocks,
        backward=backward,
        allocator=KEPT_OF_ACTIVATIONS * (of_blocks + backward) + KEPT_OF_GRADIENTS * gradients,
    )


def _parameters(config: CrossDiTConfig) -> int:
    """All of the model's, text blocks and embeddings too, which the formula's P leaves out."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CrossDiT(config).parameters())


def nearest_layout(run: Run, profile: HardwareProfile) -> str:
    """In words, the layout with the fewest GPUs of the profile that holds the run in bfloat16."""
    clips = [(_clip(run, grid), float(samples)) for grid, samples in run.grids.items()]
    problem = Problem(
        Workload(run.shape, tuple(clips), run.training.batch),
        gpus=MOST_GPUS,
        memory_bytes=profile.memory_bytes,
        batch_tolerance=BATCH_TOLERANCE,
        extensions=Extensions(ema=True, buffers=True),
        profile=profile,
    )
    try:
        best = search(problem, goal="gpus", keep=1).best
    except NothingFitsError as error:
        return str(error)
    return f"the nearest layout that fits, in bfloat16: {best.layout}; {best.memory.total_bytes / GIB:.1f} GiB a GPU"


def _clip(run: Run, grid: Grid) -> ClipShape:
    frames = min(grid[0], run.training.latent_frames or grid[0])
    return ClipShape(SPATIAL_STRIDE * grid[1], SPATIAL_STRIDE * grid[2], 1 + TEMPORAL_STRIDE * (frames - 1))
