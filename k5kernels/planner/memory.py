"""Memory of a training step on each GPU (§7.3.2).

    memory = 12 · P/N + max(4 · P/N, 2 · S · (L·d·o + 18·d + 2·d_f))        P = L · (9·d_t·d + 8·d² + 2·d_f·d)

P: parameters of the CrossDiT blocks. N: GPUs that share the states. S: tokens on the GPU. d, d_t, d_f: dims of the
model, the time embedding and the MLP. o: 0 where activations are offloaded, else 1. The report gives neither unit
nor names of the terms; bytes, float32 states and bfloat16 activations are the reading that fits.
"""

from dataclasses import dataclass, field

from k5kernels.planner.checks import positive_integer, positive_number


@dataclass(frozen=True)
class Memory:
    """Terms of the memory of one GPU, in bytes.

    states_bytes: float32 weights and both Adam moments. gradients_bytes: float32 gradients.
    block_inputs_bytes: the bfloat16 input of every block, kept for recomputation; 0 with offload.
    block_activations_bytes: what one block keeps while its backward runs.
    Gradients and activations do not peak together: the larger of the two counts.
    """

    states_bytes: float = field(metadata={"formula": "12 · P/N"})
    gradients_bytes: float = field(metadata={"formula": "4 · P/N"})
    block_inputs_bytes: float = field(metadata={"formula": "2 · S · L · d · o"})
    block_activations_bytes: float = field(metadata={"formula": "2 · S · (18·d + 2·d_f)"})

    @property
    def activations_bytes(self) -> float:
        """Inputs of all blocks and activations of one."""
        return self.block_inputs_bytes + self.block_activations_bytes

    @property
    def total_bytes(self) -> float:
        """The memory of one GPU, in bytes."""
        return self.states_bytes + max(self.gradients_bytes, self.activations_bytes)


def parameters(model_dim: int, time_dim: int, ff_dim: int, blocks: int) -> int:
    """P: parameters of the CrossDiT blocks. Raises ValueError where an argument is not a positive integer."""
    d = positive_integer("model_dim", model_dim)
    modulation = 9 * positive_integer("time_dim", time_dim) * d
    mlp = 2 * positive_integer("ff_dim", ff_dim) * d
    return positive_integer("blocks", blocks) * (modulation + 8 * d**2 + mlp)


def memory_terms(
    model_dim: int, time_dim: int, ff_dim: int, blocks: int, tokens: float, gpus: int, offload: bool
) -> Memory:
    """Terms of the memory of one GPU.

    model_dim, time_dim, ff_dim, blocks: the model. tokens: S, all visual tokens on the GPU. gpus: N, over which
    the states are sharded. offload: activations go to host memory.
    Raises ValueError where a number is not positive, one other than tokens is not an integer, or offload is not
    True or False.
    """
    p = parameters(model_dim, time_dim, ff_dim, blocks)
    s, n = positive_number("tokens", tokens), positive_integer("gpus", gpus)
    if not isinstance(offload, bool):
        raise ValueError(f"offload: expected True or False, got {offload!r}")
    return Memory(
        states_bytes=12 * p / n,
        gradients_bytes=4 * p / n,
        block_inputs_bytes=0.0 if offload else float(2 * s * blocks * model_dim),
        block_activations_bytes=float(2 * s * (18 * model_dim + 2 * ff_dim)),
    )


def memory_bytes(
    model_dim: int, time_dim: int, ff_dim: int, blocks: int, tokens: float, gpus: int, offload: bool
) -> float:
    """The memory of one GPU, in bytes; arguments and errors as in `memory_terms`."""
    return memory_terms(model_dim, time_dim, ff_dim, blocks, tokens, gpus, offload).total_bytes
