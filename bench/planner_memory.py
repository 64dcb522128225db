"""Memory of a sharded training step, term by term: PyTorch's tracker against the planner's formula (§7.3.2).

The step is CrossDiT's own, under fake tensors: shapes and lifetimes are real, numbers are not computed. `fully_shard`
splits it over a fake group of 64; every block is checkpointed; attention is `k5::block_sparse_attention`. Weights,
optimizer and reduced gradients are float32, the computation bfloat16.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from k5kernels.attention import ENGINES, AttentionConfig, Call
from k5kernels.attention.nabla import Nabla
from k5kernels.block_mask import BlockMask
from k5kernels.offload import ActivationOffload
from k5kernels.offload.pinned import PinnedStore
from k5kernels.ops.block_sparse_attention import block_sparse_attention
from k5kernels.planner import MODELS, Memory, memory_terms
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from model.latent_tokens import latent_velocity
from model.presets import PRESETS

GPUS = 64
DENSITY = 0.2
TEXT_TOKENS = 256
DEVICE, HOST = torch.device("cpu"), torch.device("meta")
PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass(frozen=True)
class Tracked:
    """Bytes of one of the GPUs, as the tracker names them.

    states: sharded weights and optimizer moments. gradients: sharded gradients after the backward. The others at the
    peak of the step. activations: all that the forward and the recomputation keep. activation_gradients: what the
    backward itself holds. communication: gathered weights, gradients not yet reduced, and buffers of both. host: block
    inputs in host memory. total: the peak.
    """

    states: int
    gradients: int
    activations: int
    activation_gradients: int
    communication: int
    host: int
    total: int


def track(preset: str, grid: tuple[int, int, int], offload: bool, blocks: int | None = None) -> Tracked:
    """Memory of a training step of the preset on one clip of T·H·W tokens; blocks: as many instead of the preset's."""
    config = replace(PRESETS[preset], visual_blocks=blocks or PRESETS[preset].visual_blocks)
    with fake_group() as mesh, FakeTensorMode(), _patches():
        model = CrossDiT(config)
        model.gradient_checkpointing = True
        for block in [*model.text_transformer_blocks, *model.visual_transformer_blocks]:
            fully_shard(block, mesh=mesh, mp_policy=PRECISION)
        fully_shard(model, mesh=mesh, mp_policy=PRECISION)
        optimizer = torch.optim.AdamW(model.parameters())
        inputs = _inputs(model, grid)
        attention = AttentionConfig(KnownDensity.name)

        def backward() -> None:
            latent_velocity(model, *inputs, attention=attention).float().square().mean().backward()

        def step() -> None:
            # A pool of host memory of its own, so that what the tracked step needs of it is seen.
            model.offload = _offload() if offload else None
            backward()

        # The first step sets up the optimizer's moments and FSDP's buffers: not tracked.
        step()
        optimizer.step()
        optimizer.zero_grad()
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(inputs)
        with tracker:
            step()
            after = _named(tracker, "current", DEVICE)
        return _terms(after, _named(tracker, "peak", DEVICE), _named(tracker, "peak", HOST))


def predicted(preset: str, grid: tuple[int, int, int], offload: bool, blocks: int | None = None) -> Memory:
    """The formula's terms for what `track` measures."""
    shape = MODELS[preset]
    tokens = grid[0] * grid[1] * grid[2]
    return memory_terms(
        shape.model_dim, shape.time_dim, shape.ff_dim, blocks or shape.blocks, tokens, GPUS, offload=offload
    )


def errors(tracked: Tracked, formula: Memory) -> dict[str, float]:
    """Relative error of each of the formula's terms against the tracker, below 0 where the formula says too little."""
    pairs = {
        "states": (formula.states_bytes, tracked.states),
        "gradients": (formula.gradients_bytes, tracked.gradients),
        "activations": (formula.activations_bytes, tracked.activations),
    }
    return {term: said / measured - 1 for term, (said, measured) in pairs.items()}


@contextmanager
def fake_group() -> Iterator[DeviceMesh]:
    """A mesh of 64 ranks, of which this process is the first and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=GPUS)
    try:
        yield init_device_mesh(DEVICE.type, (GPUS,))
    finally:
        dist.destroy_process_group()


def _inputs(model: CrossDiT, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, TextCondition]:
    config, (T, H, W) = model.config, grid
    latent = torch.empty(1, T, 2 * H, 2 * W, config.input_channels, dtype=torch.bfloat16)
    tokens = torch.empty(1, TEXT_TOKENS, config.in_text_dim, dtype=torch.bfloat16)
    pooled = torch.empty(1, config.in_text_dim2, dtype=torch.bfloat16)
    return latent, torch.empty(1), TextCondition(tokens, None, pooled)


class KnownDensity(Nabla):
    """NABLA with a mask of known density: fake scores keep nothing. The temporaries of its choice do not count."""

    name = "known_density"

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention over a share of the blocks."""
        layout = call.layout
        assert layout is not None  # by why_not
        B, h = q.shape[:2]
        offsets = q.new_empty(B, h, layout.blocks + 1, dtype=torch.int64)
        indices = q.new_empty(int(DENSITY * B * h * layout.blocks**2), dtype=torch.int32)
        return block_sparse_attention(q, k, v, BlockMask(offsets, indices, layout), layout)


class _ToMeta:
    """What stands in for copies to host memory: the CPU is the device, "meta" the host."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """As `Copies`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=HOST)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Nothing: there are no numbers."""

    def wait(self, copied: None) -> None:
        """As `Copies`."""


def _offload() -> ActivationOffload:
    offload = ActivationOffload()
    offload.stores[DEVICE] = PinnedStore(DEVICE, math.inf, _ToMeta())
    return offload


@contextmanager
def _patches() -> Iterator[None]:
    """The tracker's module hooks are off: a block has inputs that all blocks share (text, modulation), whose gradients
    come last, and until then the hooks keep the gradient of each block's tokens alive, which no training does."""
    with (
        patch.dict(ENGINES, {KnownDensity.name: KnownDensity()}),
        patch("torch.distributed._tools.mod_tracker.register_multi_grad_hook", lambda *args, **options: None),
    ):
        yield


def _named(tracker: FSDPMemTracker, which: str, device: torch.device) -> dict[str, int]:
    """Bytes on the device by the tracker's names, 0 for a device without any."""
    snapshot = tracker.get_tracker_snapshot(which).get(device, {})
    return {getattr(name, "value", name): size for name, size in snapshot.items()}


def _terms(after: dict[str, int], peak: dict[str, int], host: dict[str, int]) -> Tracked:
    communication = ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter")
    return Tracked(
        states=peak["Sharded Param"] + peak["OptState"],
        gradients=after["Sharded Grad"],
        activations=peak["Activation"],
        activation_gradients=peak["Temp"],
        communication=sum(peak[name] for name in communication),
        host=host.get("Activation", 0),
        total=peak["Total"],
    )
