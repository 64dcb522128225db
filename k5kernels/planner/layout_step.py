"""Time of a training step on a layout: the report's formula (§7.3.1) and terms of their own beside it.

The extra terms are zero in the plain formula. Each is computed for numbers and for numpy arrays alike: `search`
computes all layouts at once. For every forward and backward of a micro-batch of m clips (p GPUs share a clip, F
shards, R replicas):

* NABLA: the attention term shrinks to the density of the mask (`density.py`). Backward and recomputation use the same
  mask.
* Sequence parallelism: every term of the formula is work on single tokens or on rows of attention, and each GPU of a
  group does 1/p of it.
* No checkpointing: the report trains with checkpointing at all stages (§6.1.3), so its formula holds a forward, a
  recomputation and a backward of two forwards: without the recomputation a step takes 3/4.
* Sequence-parallel collectives: two all-to-alls a block (§6.1.3). The first moves q, k and v, the second the output:
  4·d values of 2 bytes for each of the m·S/p tokens of a GPU, of which (p − 1)/p leave it, in the forward, the
  recomputation and the backward. Attention waits for them: none is hidden.
* Shards: weights are gathered in bfloat16 for the forward and again for the backward, gradients are reduced in
  float32: 8 bytes a parameter, of which (F − 1)/F cross the link. They are hidden behind the computation (§6.1.3:
  "full overlap"); only the time beyond it is added.
* Replicas: a ring all-reduce of the gradient shard, 2·(R − 1)/R · 4 · P/F bytes, once an optimizer step, hidden behind
  the computation of the last micro-batch that the shards leave free.
* Offload: the inputs of all blocks go out during the forward (1/4 of the step) and come back during recomputation and
  backward (3/4), one direction of the host link at a time; only the time beyond these is added.
* Text encoder: a forward of 7 B parameters over 256 tokens (§5.2) for every clip (`text_encoder.py`); the clips of a
  micro-batch are spread over the GPUs of its group.
"""

from dataclasses import dataclass, field
from typing import Any, Generic, overload

import numpy as np
from numpy.typing import NDArray

from k5kernels.planner import text_encoder
from k5kernels.planner.cluster_layout import AnyLayout, ClusterLayout, ClusterLayouts
from k5kernels.planner.density import nabla_density
from k5kernels.planner.extensions import PLAIN, Extensions
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import ModelShape
from k5kernels.planner.values import Values, plain
from k5kernels.planner.workload import Workload

FORWARD_SHARE = 1 / 4  # of a step with checkpointing


@dataclass(frozen=True)
class LayoutStepTime(Generic[Values]):
    """Terms of an optimizer step in ms. The three savings against the plain formula are negative."""

    attention_ms: Values = field(metadata={"formula": "attention of m · accumulation clips, full"})
    tokenwise_and_linear_ms: Values = field(metadata={"formula": "all other of these clips"})
    nabla_ms: Values = field(metadata={"formula": "−(1 − density) · attention"})
    sequence_parallel_ms: Values = field(metadata={"formula": "−(1 − 1/p) · computation"})
    no_recomputation_ms: Values = field(metadata={"formula": "−1/4 · computation, without checkpointing"})
    sequence_collectives_ms: Values = field(metadata={"formula": "8·d·m·S/p · (p−1)/p · L · 3 B over the node's link"})
    shard_collectives_ms: Values = field(metadata={"formula": "8·P·(F−1)/F B, beyond computation"})
    replica_collectives_ms: Values = field(metadata={"formula": "8·P/F·(R−1)/R B, beyond computation"})
    offload_ms: Values = field(metadata={"formula": "2·m·S/p·d·L B each way, beyond computation"})
    text_encoder_ms: Values = field(metadata={"formula": "2 · 7e9 · 256 FLOPs a clip"})

    @property
    def computation_ms(self) -> Values:
        """The work of the blocks: what the GPU would take without waiting and without text."""
        saved = self.nabla_ms + self.sequence_parallel_ms + self.no_recomputation_ms
        return self.attention_ms + self.tokenwise_and_linear_ms + saved

    @property
    def total_ms(self) -> Values:
        """The optimizer step."""
        waits = self.sequence_collectives_ms + self.shard_collectives_ms + self.replica_collectives_ms + self.offload_ms
        return self.computation_ms + waits + self.text_encoder_ms


@overload
def layout_step_time(
    workload: Workload, layout: ClusterLayout, extensions: Extensions = ..., profile: HardwareProfile = ...
) -> LayoutStepTime[float]: ...
@overload
def layout_step_time(
    workload: Workload, layout: ClusterLayouts, extensions: Extensions = ..., profile: HardwareProfile = ...
) -> LayoutStepTime[NDArray[np.float64]]: ...
def layout_step_time(
    workload: Workload, layout: AnyLayout, extensions: Extensions = PLAIN, profile: HardwareProfile = H100
) -> LayoutStepTime[Any]:
    """Terms of an optimizer step: numbers for one layout, arrays [n] for n of them."""
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
        attention_ms=plain(attention * clips),
        tokenwise_and_linear_ms=plain(rest * clips),
        nabla_ms=plain(-(1 - density) * attention * clips),
        sequence_parallel_ms=plain(shared - full),
        no_recomputation_ms=plain(computation - shared),
        sequence_collectives_ms=plain(_sequence_collectives(workload, layout, profile) * a * on),
        shard_collectives_ms=plain(shard_wait * a * on),
        replica_collectives_ms=plain(replica_wait * on),
        offload_ms=plain(_offload_wait(workload, layout, forward / a, profile) * a * on),
        text_encoder_ms=plain(_text_encoder(layout, profile) * a * float(extensions.text_encoder)),
    )


def _sequence_collectives(workload: Workload, layout: AnyLayout, profile: HardwareProfile) -> Any:
    """ms of the all-to-alls of a micro-batch."""
    p = layout.sequence_parallel
    tokens = layout.micro_batch * workload.mean_tokens / p
    sent = 8 * workload.model.model_dim * tokens * (p - 1) / p * workload.model.blocks
    passes = np.where(layout.checkpointing, 3, 2)
    return 1e3 * sent * passes / profile.node_bytes_per_s


def _collectives(model: ModelShape, layout: AnyLayout, computation: Any, profile: HardwareProfile) -> tuple[Any, Any]:
    """(ms of a micro-batch that shards wait, ms of a step that replicas wait) beyond the computation that hides it."""
    weights = model.parameters
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


def _offload_wait(workload: Workload, layout: AnyLayout, forward: Any, profile: HardwareProfile) -> Any:
    """ms of a micro-batch that offload waits: out during the forward, back during the rest."""
    tokens = layout.micro_batch * workload.mean_tokens / layout.sequence_parallel
    moved = 1e3 * 2 * tokens * workload.model.model_dim * workload.model.blocks / profile.host_bytes_per_s
    backward = forward * (1 / FORWARD_SHARE - 1)
    wait = np.maximum(0.0, moved - forward) + np.maximum(0.0, moved - backward)
    return np.where(layout.offload, wait, 0.0)


def _text_encoder(layout: AnyLayout, profile: HardwareProfile) -> Any:
    """ms of a micro-batch for its text."""
    clips = -(-layout.micro_batch // layout.sequence_parallel)  # of the GPU of the group that has most
    flops = 2 * text_encoder.PARAMETERS * text_encoder.TOKENS
    return 1e3 * clips * flops / (text_encoder.FLOPS_PER_S * profile.speed)
