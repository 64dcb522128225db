"""Memory of a training step on each GPU: the report's formula (§7.3.2) and terms of their own beside it.

    memory = 12 · P/N + max(4 · P/N, 2 · S · (L·d·o + 18·d + 2·d_f))        P = L · (9·d_t·d + 8·d² + 2·d_f·d)

P: parameters of the CrossDiT blocks. N: GPUs that share the states. S: tokens on the GPU. d, d_t, d_f: dims of the
model, the time embedding and the MLP. o: 0 where activations are offloaded, else 1. The report gives neither unit
nor names of the terms; bytes, float32 states and bfloat16 activations are the reading that fits.

The other terms are zero in the plain formula (m clips of a micro-batch, p GPUs that share a clip, F shards: on a layout
N is F, and the tokens on the GPU are m · S/p):

* No checkpointing: every block keeps what the formula counts for one, and no block input is kept beside.
* Accumulation: gradients of earlier micro-batches stay beside the activations. In one process without shards those of
  the blocks that are done do so too.
* EMA: one more float32 copy (§6.3.2). Moments of the optimizer in bfloat16: 4·P/F bytes less, in int8 6·P/F.
* Gathered blocks: bfloat16 weights of two blocks, the one that runs and the one on its way, and as much again for a
  block's gradients until they are reduced: 8·P/L bytes.
* Backward: gradients inside a block, largest at its MLP: 2·d + d_f values a token.
* Offload buffers: two block inputs, the one on its way and the one in use.
* Text encoder (`text_encoder.py`), over at most 32 shards (§6.1.3).
* Frozen weights: of the blocks, where an adapter is trained beside them (`lora.py`).
* Reserve: what the allocator and the driver keep.
"""

from dataclasses import dataclass, replace
from typing import Any, Generic, overload

import numpy as np
from numpy.typing import NDArray

from k5kernels.planner import text_encoder
from k5kernels.planner.checks import positive_integer, positive_number, switch
from k5kernels.planner.cluster_layout import AnyLayout, ClusterLayout, ClusterLayouts
from k5kernels.planner.extensions import MOMENT_BYTES, PLAIN, Extensions
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.shapes import ModelShape, parameters
from k5kernels.planner.values import Values, plain
from k5kernels.planner.workload import Workload

BFLOAT16_BYTES = 2


NOT_IN_THE_REPORT: Any = 0.0  # what a term is where it is left out


@dataclass(frozen=True)
class Memory(Generic[Values]):
    """Terms of the memory of one GPU, or of a process that trains alone, in bytes. The first four are the report's.

    states_bytes: float32 weights and both Adam moments. gradients_bytes: float32 gradients.
    block_inputs_bytes: the input of every block, kept for recomputation; 0 with offload.
    block_activations_bytes: what one block keeps while its backward runs, or what all keep without checkpointing.
    accumulated_gradients_bytes: gradients that are there beside the activations. The other terms: see the module.
    Gradients and activations do not peak together: the larger of the two counts.
    """

    states_bytes: Values
    gradients_bytes: Values
    block_inputs_bytes: Values
    block_activations_bytes: Values
    accumulated_gradients_bytes: Values = NOT_IN_THE_REPORT
    ema_bytes: Values = NOT_IN_THE_REPORT
    optimizer_dtype_bytes: Values = NOT_IN_THE_REPORT
    gathered_blocks_bytes: Values = NOT_IN_THE_REPORT
    backward_bytes: Values = NOT_IN_THE_REPORT
    offload_buffers_bytes: Values = NOT_IN_THE_REPORT
    frozen_weights_bytes: Values = NOT_IN_THE_REPORT
    text_encoder_bytes: Values = NOT_IN_THE_REPORT
    reserve_bytes: Values = NOT_IN_THE_REPORT

    @property
    def activations_bytes(self) -> Values:
        """Inputs and activations of the blocks, the inputs on their way to or from the host, and their gradients."""
        kept = self.block_inputs_bytes + self.block_activations_bytes
        return kept + self.offload_buffers_bytes + self.backward_bytes

    @property
    def used_bytes(self) -> Values:
        """Everything but the reserve."""
        report: Any = self.states_bytes + np.maximum(self.gradients_bytes, self.activations_bytes)
        added = self.accumulated_gradients_bytes + self.ema_bytes + self.optimizer_dtype_bytes
        held = self.gathered_blocks_bytes + self.text_encoder_bytes + self.frozen_weights_bytes
        return plain(report + added + held)

    @property
    def total_bytes(self) -> Values:
        """The peak."""
        return self.used_bytes + self.reserve_bytes


# How an answer says its terms.
REPORT_FORMULAS = {
    "states_bytes": "12 · P/N",
    "gradients_bytes": "4 · P/N",
    "block_inputs_bytes": "2 · S · L · d · o",
    "block_activations_bytes": "2 · S · (18·d + 2·d_f)",
}
LAYOUT_FORMULAS = {
    "states_bytes": "12 · P/F",
    "gradients_bytes": "4 · P/F",
    "block_inputs_bytes": "2 · m · S/p · L · d · o, with checkpointing",
    "block_activations_bytes": "2 · m · S/p · (18·d + 2·d_f), · L without checkpointing",
    "accumulated_gradients_bytes": "the smaller of gradients and activations, with accumulation",
    "ema_bytes": "4 · P/F",
    "optimizer_dtype_bytes": "−4 · P/F with bfloat16 moments, −6 · P/F with int8",
    "gathered_blocks_bytes": "8 · P/L, with shards",
    "backward_bytes": "2 · m · S/p · (2·d + d_f)",
    "offload_buffers_bytes": "2 · 2 · m · S/p · d",
    "text_encoder_bytes": "2 · 8.29e9 / min(32, GPUs)",
    "reserve_bytes": "the profile's share of all above",
}


def beside_block_inputs(terms: Memory[float]) -> Memory[float]:
    """The terms of a process that trains alone: block by block the backward frees block inputs and fills gradients, so
    that what one block keeps is there beside the larger of both.

    The report's formula leaves that out: over 64 shards gradients are smaller than activations.
    """
    of_a_block = terms.block_activations_bytes + terms.backward_bytes
    beside = min(of_a_block, max(0.0, terms.gradients_bytes - terms.block_inputs_bytes))
    return replace(terms, accumulated_gradients_bytes=beside)


def training_memory(
    model: ModelShape,
    tokens: Any,
    layout: AnyLayout,
    extensions: Extensions = PLAIN,
    weights: int | None = None,
    value_bytes: int = BFLOAT16_BYTES,
) -> Memory[Any]:
    """Every term but the reserve.

    tokens: S on the GPU, all clips of a micro-batch; a number or an array as the layout's fields are. weights:
    parameters that are trained, P where None. value_bytes: of one activation.
    """
    p, f = weights or model.parameters, layout.shards
    d, d_f, L, values = model.model_dim, model.ff_dim, model.blocks, value_bytes * np.asarray(tokens, np.float64)
    checkpointing, offload = np.asarray(layout.checkpointing, bool), np.asarray(layout.offload, bool)
    gradients = 4 * p / f
    one_input = values * d
    inputs = np.where(offload | ~checkpointing, 0.0, one_input * L)
    one_block = values * (18 * d + 2 * d_f)
    activations = np.where(checkpointing, one_block, one_block * L)
    buffers = float(extensions.buffers)
    moving = np.where(offload, buffers * min(2, L) * one_input, 0.0)
    backward = buffers * values * (2 * d + d_f)
    saved = 2 * (MOMENT_BYTES["float32"] - MOMENT_BYTES[extensions.optimizer_dtype])
    both = np.minimum(gradients, inputs + activations + moving + backward)
    encoder = text_encoder.STORED_BYTES / np.minimum(text_encoder.SHARDS, layout.gpus)
    terms = {
        "states_bytes": 12 * p / f,
        "gradients_bytes": gradients,
        "block_inputs_bytes": inputs,
        "block_activations_bytes": activations,
        "accumulated_gradients_bytes": np.where(layout.accumulation > 1, both, 0.0),
        "ema_bytes": 4 * p / f * extensions.ema,
        "optimizer_dtype_bytes": 0.0 - saved * p / f,
        "gathered_blocks_bytes": np.where(f > 1, buffers * 8 * p / L, 0.0),
        "backward_bytes": backward,
        "offload_buffers_bytes": moving,
        "text_encoder_bytes": encoder * extensions.text_encoder,
        "reserve_bytes": 0.0,
    }
    return Memory(**{name: plain(value) for name, value in terms.items()})


@overload
def layout_memory(
    workload: Workload, layout: ClusterLayout, extensions: Extensions = ..., profile: HardwareProfile = ...
) -> Memory[float]: ...
@overload
def layout_memory(
    workload: Workload, layout: ClusterLayouts, extensions: Extensions = ..., profile: HardwareProfile = ...
) -> Memory[NDArray[np.float64]]: ...
def layout_memory(
    workload: Workload, layout: AnyLayout, extensions: Extensions = PLAIN, profile: HardwareProfile = H100
) -> Memory[Any]:
    """Terms of the memory of one GPU for the largest clip: numbers for one layout, arrays [n] for n of them."""
    tokens = layout.micro_batch * workload.largest_tokens / layout.sequence_parallel
    terms = training_memory(workload.model, tokens, layout, extensions)
    return replace(terms, reserve_bytes=terms.used_bytes * profile.memory_reserve * extensions.reserve)


def memory_terms(
    model_dim: int, time_dim: int, ff_dim: int, blocks: int, tokens: float, gpus: int, offload: bool
) -> Memory[float]:
    """The report's terms of the memory of one GPU; all others are 0.

    model_dim, time_dim, ff_dim, blocks: the model. tokens: S, all visual tokens on the GPU. gpus: N, over which
    the states are sharded. offload: activations go to host memory.
    Raises ValueError where a number is not positive, one other than tokens is not an integer, or offload is not
    True or False.
    """
    parameters(model_dim, time_dim, ff_dim, blocks)  # refuses numbers that no model has
    held, shards = positive_number("tokens", tokens), positive_integer("gpus", gpus)
    switch("offload", offload)
    model = ModelShape(model_dim, time_dim, ff_dim, blocks)
    return training_memory(model, held, ClusterLayout(shards=shards, offload=offload))


def memory_bytes(
    model_dim: int, time_dim: int, ff_dim: int, blocks: int, tokens: float, gpus: int, offload: bool
) -> float:
    """The memory of one GPU, in bytes; arguments and errors as in `memory_terms`."""
    return memory_terms(model_dim, time_dim, ff_dim, blocks, tokens, gpus, offload).total_bytes
