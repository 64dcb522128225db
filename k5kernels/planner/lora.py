"""Memory of training a LoRA adapter on one GPU, its text and latents encoded before.

The blocks stay as they are, in bfloat16 or quantized; n of the L may wait in host memory, where they change places with
others ("block swap"). A quantized block is turned into bfloat16 while it runs, and the copy is kept for its backward.
The adapter has a weight of [rank, in] and one of [out, rank] beside each linear layer it learns.

What one block keeps while its backward runs, gradients inside it too, is counted in values of 2 bytes a token on
diffusers' own transformer, which public trainers run eagerly, under fake tensors (bench/lora_memory.py). A linear layer
that is frozen need not keep its input; one with an adapter does, and again in float32 where the adapter is.

What a process holds beside its tensors (driver, libraries, the allocator's slack, weights outside the blocks) is taken
to be what Table 5 shows of generations: `InferenceRates.base_bytes`.
"""

from dataclasses import dataclass

from k5kernels.planner.checks import one_of, positive_integer, positive_number
from k5kernels.planner.extensions import MOMENT_BYTES
from k5kernels.planner.inference import table5_rates
from k5kernels.planner.memory import BFLOAT16_BYTES, Memory, beside_block_inputs
from k5kernels.planner.quantization import WEIGHT_BYTES, weight_bytes
from k5kernels.planner.shapes import ModelShape, swapped_blocks

ADAPTER_BYTES = {"bfloat16": 2, "float32": 4}
# Which layers learn, dtype of the adapter: (a, b), a block keeps a·d + b·d_f values of a token. Counted at d_f = 4·d,
# as the released models have it: 33.6, 35.6, 38.6 and 50.7 times d.
BLOCK_VALUES = {
    ("qkv", "bfloat16"): (22, 3),
    ("qkv", "float32"): (24, 3),
    ("all", "bfloat16"): (23, 4),
    ("all", "float32"): (31, 5),
}
LAYERS = ("qkv", "all")
LORA_FORMULAS = {
    "frozen_weights_bytes": "bytes · P · (1 − n/L), and a block in bfloat16 where quantized",
    "states_bytes": "adapter: its weights and both moments",
    "gradients_bytes": "adapter",
    "block_inputs_bytes": "2 · S · L · d, with checkpointing",
    "block_activations_bytes": "2 · S · (a·d + b·d_f), · L without checkpointing",
    "accumulated_gradients_bytes": "gradients beyond block inputs, up to one block",
    "reserve_bytes": "what a process holds beside, by Table 5",
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and how the weights that it is trained beside are held.

    layers: "qkv" (of self- and cross-attention) or "all" (their outputs and the MLP too). dtype: of the adapter and its
    gradients; "float32" is trained under autocast. base_dtype: of the blocks, one of `quantization.WEIGHT_BYTES`.
    swapped: blocks that wait in host memory. optimizer_dtype: of Adam's moments.
    Raises ValueError that names the field where one cannot be.
    """

    rank: int
    layers: str = "qkv"
    dtype: str = "bfloat16"
    base_dtype: str = "bfloat16"
    swapped: int = 0
    optimizer_dtype: str = "float32"

    def __post_init__(self) -> None:
        positive_integer("rank", self.rank)
        one_of("layers", self.layers, LAYERS)
        one_of("dtype", self.dtype, ADAPTER_BYTES)
        one_of("base_dtype", self.base_dtype, WEIGHT_BYTES)
        one_of("optimizer_dtype", self.optimizer_dtype, MOMENT_BYTES)

    def parameters(self, model: ModelShape) -> int:
        """Of the adapters of all blocks."""
        d, d_f = model.model_dim, model.ff_dim
        sides = 12 * d if self.layers == "qkv" else 18 * d + 2 * d_f
        return model.blocks * self.rank * sides


def lora_memory(model: ModelShape, adapter: Adapter, tokens: float, checkpointing: bool = True) -> Memory[float]:
    """Terms of the memory of one GPU that trains the adapter.

    tokens: visual tokens of a step, all its clips.
    Raises ValueError where they are not a number above 0, or more blocks are swapped than may be.
    """
    positive_number("tokens", tokens)
    d, L, weights = model.model_dim, model.blocks, adapter.parameters(model)
    here = L - swapped_blocks(adapter.swapped, model)
    stored = weight_bytes("base_dtype", adapter.base_dtype)
    running = 0.0 if adapter.base_dtype == "bfloat16" else BFLOAT16_BYTES * model.parameters / L
    of_width, of_mlp = BLOCK_VALUES[adapter.layers, adapter.dtype]
    one_block = BFLOAT16_BYTES * tokens * (of_width * d + of_mlp * model.ff_dim)
    width = ADAPTER_BYTES[adapter.dtype]
    terms = Memory(
        states_bytes=weights * (width + 2.0 * MOMENT_BYTES[adapter.optimizer_dtype]),
        gradients_bytes=float(weights * width),
        block_inputs_bytes=float(BFLOAT16_BYTES * tokens * d * L) if checkpointing else 0.0,
        block_activations_bytes=one_block if checkpointing else one_block * L,
        frozen_weights_bytes=stored * model.parameters * here / L + running,
        reserve_bytes=table5_rates().base_bytes,
    )
    return beside_block_inputs(terms)
