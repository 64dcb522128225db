"""What the planner says of a run of this trainer, before it runs and beside what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from k5kernels.planner import HardwareProfile, Memory, ModelShape, step_time_terms
from k5kernels.planner.candidates import Problem
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.density import nabla_density
from k5kernels.planner.extensions import Extensions
from k5kernels.planner.memory import beside_block_inputs, training_memory
from k5kernels.planner.search import NothingFitsError, search
from k5kernels.planner.shapes import PATCH, TOKEN_PIXELS, ClipShape
from k5kernels.planner.workload import Workload
from k5kernels.presets import CrossDiTConfig
from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from model.crossdit import CrossDiT
from train.crossdit_stage import FlowMatching
from train.latents import LatentSet
from train.parallel import Parallel
from train.resident import resident_bytes
from train.settings import Settings

GIB = 2**30
LOADED_BYTES = 0.07 * GIB  # by PyTorch with the first step, set to measured runs like the two below
KEPT_OF_ACTIVATIONS, KEPT_OF_GRADIENTS = 1.5, 2.0  # by glibc, of what it was given back
MOST_GPUS = 1024  # of the search for a layout that fits
BATCH_TOLERANCE = 1e-6  # the clips of a step are the run's, exactly

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """What decides the time and the memory of a step.

    grids: latent [T, H, W] -> how often it is drawn. density: of NABLA's masks, 1 with dense attention. layout: of the
    processes; its micro-batch is the samples of one. offload: of the blocks' inputs. image_grids: as grids, of the
    steps on images alone.
    """

    model: CrossDiTConfig
    training: FlowMatching
    grids: Mapping[Grid, float]
    checkpointing: bool
    density: float = 1.0
    layout: ClusterLayout | None = None
    offload: bool = False
    image_grids: Mapping[Grid, float] = field(default_factory=dict)

    @property
    def processes(self) -> ClusterLayout:
        """The layout, of one process where none is given."""
        layout = self.layout or ClusterLayout(micro_batch=self.training.batch)
        return replace(layout, checkpointing=self.checkpointing, offload=self.offload and self.checkpointing)

    @property
    def shape(self) -> ModelShape:
        """The model as the formulas take it."""
        return ModelShape.of(self.model)


def tokens(run: Run, grid: Grid) -> int:
    """Visual tokens of one sample of the grid, cut to the run's latent frames."""
    frames = min(grid[0], run.training.latent_frames or grid[0])
    return frames * (grid[1] // PATCH) * (grid[2] // PATCH)


def predicted_ms(run: Run, profile: HardwareProfile) -> float:
    """Time of a step in ms, mean over the grids as they are drawn; the density scales attention.

    The processes that share a sequence share its time; collectives are taken as hidden behind the computation.
    """
    training, layout = run.training, run.processes
    share = training.image_share if run.image_grids else 0.0
    total = (1 - share) * _mean_ms(run, run.grids, layout.micro_batch, profile) if share < 1 else 0.0
    if share:
        images = {(1, H, W): weight for (_, H, W), weight in run.image_grids.items()}
        samples = layout.micro_batch * training.batch_of(images=True) // training.batch
        total += share * _mean_ms(run, images, samples, profile)
    return total / layout.sequence_parallel


def _mean_ms(run: Run, grids: Mapping[Grid, float], samples: int, profile: HardwareProfile) -> float:
    """Of one process that computes so many whole samples."""
    total = 0.0
    for grid, weight in grids.items():
        pixels = tokens(run, grid) * TOKEN_PIXELS
        terms = step_time_terms(run.shape.model_dim, pixels, run.shape.blocks, samples, profile)
        total += weight * (terms.total_ms - (1 - run.density) * terms.attention_ms)
    return total / sum(grids.values())


def predicted_memory(run: Run) -> Memory[float]:
    """Memory of a step of this process, beside what the process holds before there is a model.

    The planner's terms (`k5kernels.planner.memory`), but for all of the model's weights, and in float32 unless the
    run is bf16; activations are of the largest grid. The reserve is this trainer's own: code that PyTorch loads with
    the first step, and what glibc keeps between tensors of different sizes instead of giving it back, by a rule fitted
    to measured runs. (Giving all back would make a step take half as long again.)
    """
    layout = run.processes
    largest = layout.micro_batch * max(tokens(run, grid) for grid in run.grids) / layout.sequence_parallel
    terms = training_memory(
        run.shape,
        largest,
        layout,
        Extensions(ema=True, buffers=True),
        weights=_parameters(run.model),
        value_bytes=2 if run.training.bf16 else 4,
    )
    of_a_block = terms.block_activations_bytes + terms.backward_bytes
    reserve = LOADED_BYTES + KEPT_OF_ACTIVATIONS * of_a_block + KEPT_OF_GRADIENTS * terms.gradients_bytes
    return replace(beside_block_inputs(terms), reserve_bytes=reserve)


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


def planned_run(settings: Settings, data: LatentSet, sizes: CrossDiTConfig, parallel: Parallel) -> Run:
    """What decides the time and the memory of a step, for the planner."""
    config = settings.training
    drawn = [data.weights(images if config.image_share else None, config.resolutions) for images in (False, True)]
    return Run(
        sizes,
        config,
        drawn[0],
        settings.checkpointing,
        nabla_density(settings.nabla_thr),
        layout_of(parallel, config.batch),
        settings.offload,
        drawn[1] if config.image_share else {},
    )


def layout_of(parallel: Parallel, batch: int) -> ClusterLayout:
    """The processes as the planner counts them: its shards are those of the weights, over which sequences run too."""
    return ClusterLayout(
        parallel.shard * parallel.sequence, parallel.replicate, parallel.sequence, batch // parallel.data_ranks
    )


def in_log(run: Run, profile: HardwareProfile, device: torch.device) -> dict[str, Any]:
    """What every row of the log has of the prediction; before the model is on the device."""
    base = resident_bytes(device)
    return {
        "predicted_ms": float(f"{predicted_ms(run, profile):.4g}"),
        "predicted_bytes": round(base + predicted_memory(run).total_bytes),
        "base_bytes": base,
        "hardware": profile.name,
    }
