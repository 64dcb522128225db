"""What a layout adds to the report's formulas: terms of their own, all zero in the plain formulas.

Each formula serves numbers and numpy arrays alike: `search` computes all layouts at once with it.

Time, for every forward and backward of a micro-batch of m clips (p GPUs share a clip, F shards, R replicas):

* NABLA: the attention term shrinks to the density of the mask (`density.py`). Backward and recomputation use the same
  mask.
* Sequence parallelism: all terms are tokenwise or attention rows, and every GPU of a group has 1/p of them.
* No checkpointing: the report trains with it at all stages (§6.1.3), so its formula holds forward, recomputation and
  a backward of two forwards: without recomputation a step takes 3/4.
* Sequence-parallel collectives: two all-to-alls a block (§6.1.3). The first moves q, k and v, the second the output:
  4·d values of 2 bytes for each of the m·S/p tokens of a GPU, of which (p − 1)/p leave it. In forward, recomputation
  and backward alike. Attention waits for them: none is hidden.
* Shards: weights are gathered in bfloat16 for the forward and again for the backward, gradients are reduced in
  float32: 8 bytes a parameter, of which (F − 1)/F cross the link. Hidden behind the computation (§6.1.3: "full
  overlap"); what exceeds it is added.
* Replicas: a ring all-reduce of the gradient shard, 2·(R − 1)/R · 4 · P/F bytes, once an optimizer step, hidden behind
  what the last micro-batch leaves free.
* Offload: the inputs of all blocks go out during the forward (1/4 of the step) and come back during recomputation and
  backward (3/4), one direction of the host link at a time; what exceeds these times is added.
* Text encoder: a forward of 7 B parameters over 256 tokens (§5.2) for every clip, at 400 TFLOP/s on an H100 (about
  what large bfloat16 products reach there); the clips of a micro-batch are spread over the GPUs of its group.

Memory of a GPU:

* No checkpointing: every block keeps what the formula counts for one.
* Accumulation: gradients stay while the next micro-batch runs, so they add to the activations.
* EMA: one more float32 copy (§6.3.2). Moments of the optimizer in bfloat16: 4·P/F bytes less.
* Gathered blocks: bfloat16 weights of two blocks, the one that runs and the one on its way, and as much again for a
  block's gradients until they are reduced: 8·P/L bytes.
* Backward: gradients inside a block, largest at its MLP: 2·d + d_f values of 2 bytes a token.
* Offload buffers: two block inputs, the one on its way and the one in use.
* Text encoder: 8.29 B parameters (Qwen2.5-VL-7B with its vision tower) in bfloat16 over at most 32 shards (§6.1.3).
* Reserve: what the allocator and the driver take, a share of the rest (the profile's `memory_reserve`).
"""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from k5kernels.planner.density import nabla_density
from k5kernels.planner.layout import Layout
from k5kernels.planner.memory import parameters
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import ModelShape
from k5kernels.planner.workload import Workload

FORWARD_SHARE = 1 / 4  # of a step with checkpointing
TEXT_PARAMETERS = 7e9
TEXT_FLOPS_PER_S = 400e12
TEXT_STORED_BYTES = 2 * 8.29e9
TEXT_TOKENS = 256
TEXT_SHARDS = 32
OPTIMIZER_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Extensions:
    """Which terms join beside those that the layout itself brings. All off: the report's formulas."""

    communication: bool = False
    text_encoder: bool = False
    ema: bool = False
    buffers: bool = False
    reserve: bool = False
    optimizer_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("communication", "text_encoder", "ema", "buffers", "reserve"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.optimizer_dtype not in OPTIMIZER_DTYPES:
            expected = ", ".join(OPTIMIZER_DTYPES)
            raise ValueError(f"optimizer_dtype: expected one of {expected}, got {self.optimizer_dtype!r}")


PLAIN = Extensions()
FULL = Extensions(communication=True, text_encoder=True, ema=True, buffers=True, reserve=True)


@dataclass(frozen=True)
class LayoutStepTime:
    """Terms of an optimizer step in ms; negative ones are savings against the plain formula, the first two."""

    attention_ms: Any = field(metadata={"formula": "attention of m · accumulation clips, full"})
    tokenwise_and_linear_ms: Any = field(metadata={"formula": "all other of these clips"})
    nabla_ms: Any = field(metadata={"formula": "−(1 − density) · attention"})
    sequence_parallel_ms: Any = field(metadata={"formula": "−(1 − 1/p) · computation"})
    no_recomputation_ms: Any = field(metadata={"formula": "−1/4 · computation, without checkpointing"})
    sequence_collectives_ms: Any = field(metadata={"formula": "8·d·m·S/p · (p−1)/p · L · 3 B over the node's link"})
    shard_collectives_ms: Any = field(metadata={"formula": "8·P·(F−1)/F B, beyond computation"})
    replica_collectives_ms: Any = field(metadata={"formula": "8·P/F·(R−1)/R B, beyond computation"})
    offload_ms: Any = field(metadata={"formula": "2·m·S/p·d·L B each way, beyond computation"})
    text_encoder_ms: Any = field(metadata={"formula": "2 · 7e9 · 256 FLOPs a clip"})

    @property
    def computation_ms(self) -> Any:
        """The blocks' own work: what the GPU would take without waiting and without text."""
        saved = self.nabla_ms + self.sequence_parallel_ms + self.no_recomputation_ms
        return self.attention_ms + self.tokenwise_and_linear_ms + saved

    @property
    def total_ms(self) -> Any:
        """The optimizer step."""
        waits = self.sequence_collectives_ms + self.shard_collectives_ms + self.replica_collectives_ms + self.offload_ms
        return self.computation_ms + waits + self.text_encoder_ms


def layout_step_time(
    workload: Workload, layout: Layout, extensions: Extensions = PLAIN, profile: HardwareProfile = H100
) -> LayoutStepTime:
    """Terms of an optimizer step; the layout's fields are numbers, or numpy arrays of one length."""
    attention, rest = workload.clip_time_ms(profile)
    p, a = layout.sequence_parallel, layout.accumulation
    clips = layout.micro_batch * a
    density = nabla_density(workload.nabla_thr)
    full = (attention * density + rest) * clips
    shared = full / p
    forward = shared * FORWARD_SHARE
    computation = shared - np.where(layout.checkpointing, 0.0, forward)
    shard_wait, replica_wait = _collectives(workload.model, layout, computation / a, profile)
    on = float(extensions.communication)
    return LayoutStepTime(
        attention_ms=attention * clips,
        tokenwise_and_linear_ms=rest * clips,
        nabla_ms=-(1 - density) * attention * clips,
        sequence_parallel_ms=shared - full,
        no_recomputation_ms=computation - shared,
        sequence_collectives_ms=_sequence_collectives(workload, layout, profile) * a * on,
        shard_collectives_ms=shard_wait * a * on,
        replica_collectives_ms=replica_wait * on,
        offload_ms=_offload_wait(workload, layout, forward / a, profile) * a * on,
        text_encoder_ms=_text_encoder(layout, profile) * a * float(extensions.text_encoder),
    )


def _sequence_collectives(workload: Workload, layout: Layout, profile: HardwareProfile) -> Any:
    """ms of the all-to-alls of a micro-batch."""
    p = layout.sequence_parallel
    tokens = layout.micro_batch * workload.mean_tokens / p
    sent = 8 * workload.model.model_dim * tokens * (p - 1) / p * workload.model.blocks
    passes = np.where(layout.checkpointing, 3, 2)
    return 1e3 * sent * passes / profile.node_bytes_per_s


def _collectives(model: ModelShape, layout: Layout, computation: Any, profile: HardwareProfile) -> tuple[Any, Any]:
    """(ms of a micro-batch that shards wait, ms of a step that replicas wait) beyond the computation that hides it."""
    weights = parameters(model.model_dim, model.time_dim, model.ff_dim, model.blocks)
    f, r = layout.shards, layout.replicas
    shards = 8 * weights * (f - 1) / f / _link(f, profile)
    # Shards stand side by side: any two replicas of a GPU are at least F apart.
    replicas = 8 * weights / f * (r - 1) / r / _link(layout.gpus, profile)
    shard_wait = np.maximum(0.0, 1e3 * shards - computation)
    both_wait = np.maximum(0.0, 1e3 * (shards + replicas) - computation)
    return shard_wait, both_wait - shard_wait


def _link(gpus: Any, profile: HardwareProfile) -> Any:
    """Bytes a second between neighbours of a group of that many GPUs."""
    return np.where(gpus <= profile.gpus_per_node, profile.node_bytes_per_s, profile.network_bytes_per_s)


def _offload_wait(workload: Workload, layout: Layout, forward: Any, profile: HardwareProfile) -> Any:
    """ms of a micro-batch that offload waits: out during the forward, back during the rest."""
    tokens = layout.micro_batch * workload.mean_tokens / layout.sequence_parallel
    moved = 1e3 * 2 * tokens * workload.model.model_dim * workload.model.blocks / profile.host_bytes_per_s
    backward = forward * (1 / FORWARD_SHARE - 1)
    wait = np.maximum(0.0, moved - forward) + np.maximum(0.0, moved - backward)
    return np.where(layout.offload, wait, 0.0)


def _text_encoder(layout: Layout, profile: HardwareProfile) -> Any:
    """ms of a micro-batch for its text."""
    clips = -(-layout.micro_batch // layout.sequence_parallel)  # of the GPU of the group that has most
    return 1e3 * clips * 2 * TEXT_PARAMETERS * TEXT_TOKENS / (TEXT_FLOPS_PER_S * profile.speed)


@dataclass(frozen=True)
class LayoutMemory:
    """Terms of the memory of one GPU, in bytes. The first four are the report's; the larger of gradients and
    activations counts, both where gradients are accumulated.
    """

    states_bytes: Any = field(metadata={"formula": "12 · P/F"})
    gradients_bytes: Any = field(metadata={"formula": "4 · P/F"})
    block_inputs_bytes: Any = field(metadata={"formula": "2 · m · S/p · L · d · o, with checkpointing"})
    block_activations_bytes: Any = field(
        metadata={"formula": "2 · m · S/p · (18·d + 2·d_f), · L without checkpointing"}
    )
    accumulated_gradients_bytes: Any = field(
        metadata={"formula": "the smaller of gradients and activations, with accumulation"}
    )
    ema_bytes: Any = field(metadata={"formula": "4 · P/F"})
    optimizer_dtype_bytes: Any = field(metadata={"formula": "−4 · P/F with bfloat16 moments"})
    gathered_blocks_bytes: Any = field(metadata={"formula": "8 · P/L, with shards"})
    backward_bytes: Any = field(metadata={"formula": "2 · m · S/p · (2·d + d_f)"})
    offload_buffers_bytes: Any = field(metadata={"formula": "2 · 2 · m · S/p · d"})
    text_encoder_bytes: Any = field(metadata={"formula": "2 · 8.29e9 / min(32, N)"})
    reserve_bytes: Any = field(metadata={"formula": "the profile's share of all above"})

    @property
    def activations_bytes(self) -> Any:
        """Inputs and activations of the blocks, the inputs on their way to or from the host, and their gradients."""
        kept = self.block_inputs_bytes + self.block_activations_bytes
        return kept + self.offload_buffers_bytes + self.backward_bytes

    @property
    def total_bytes(self) -> Any:
        """The memory of one GPU."""
        return self.used_bytes + self.reserve_bytes

    @property
    def used_bytes(self) -> Any:
        """Everything but the reserve."""
        plain = self.states_bytes + np.maximum(self.gradients_bytes, self.activations_bytes)
        added = self.accumulated_gradients_bytes + self.ema_bytes + self.optimizer_dtype_bytes
        return plain + added + self.gathered_blocks_bytes + self.text_encoder_bytes


def layout_memory(
    workload: Workload, layout: Layout, extensions: Extensions = PLAIN, profile: HardwareProfile = H100
) -> LayoutMemory:
    """Terms of the memory of one GPU; the layout's fields are numbers, or numpy arrays of one length."""
    model, f = workload.model, layout.shards
    weights = parameters(model.model_dim, model.time_dim, model.ff_dim, model.blocks)
    values = layout.micro_batch * workload.largest_tokens / layout.sequence_parallel
    gradients = 4 * weights / f
    one_input = 2 * values * model.model_dim
    kept_inputs = np.where(layout.offload | ~_boolean(layout.checkpointing), 0.0, one_input * model.blocks)
    one_block = 2 * values * (18 * model.model_dim + 2 * model.ff_dim)
    activations = np.where(layout.checkpointing, one_block, one_block * model.blocks)
    buffers = float(extensions.buffers)
    moving = np.where(layout.offload, buffers * min(2, model.blocks) * one_input, 0.0)
    backward = buffers * 2 * values * (2 * model.model_dim + model.ff_dim)
    shards_of_text = np.minimum(TEXT_SHARDS, layout.gpus)
    terms = LayoutMemory(
        states_bytes=12 * weights / f,
        gradients_bytes=gradients,
        block_inputs_bytes=kept_inputs,
        block_activations_bytes=activations,
        accumulated_gradients_bytes=np.where(
            layout.accumulation > 1, np.minimum(gradients, kept_inputs + activations + moving + backward), 0.0
        ),
        ema_bytes=4 * weights / f * extensions.ema,
        optimizer_dtype_bytes=0.0 - 4 * weights / f * (extensions.optimizer_dtype == "bfloat16"),
        gathered_blocks_bytes=np.where(f > 1, buffers * 8 * weights / model.blocks, 0.0),
        backward_bytes=backward,
        offload_buffers_bytes=moving,
        text_encoder_bytes=TEXT_STORED_BYTES / shards_of_text * extensions.text_encoder,
        reserve_bytes=0.0,
    )
    reserve = terms.used_bytes * profile.memory_reserve * extensions.reserve
    return LayoutMemory(**{f.name: getattr(terms, f.name) for f in fields(terms)} | {"reserve_bytes": reserve})


def _boolean(value: Any) -> Any:
    """~ of a Python bool is a number; of a numpy one, its opposite."""
    return np.asarray(value, dtype=bool)
