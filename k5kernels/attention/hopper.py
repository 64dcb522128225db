"""NABLA by the kernels that are written for Hopper GPUs, for who asks for them by name.

    register_engine(NablaHopper())
    attention(q, k, v, "nabla_hopper", layout)

These kernels have run on no GPU yet. So the engine stands in no table until it is registered: "auto", `choose_engine`
and `k5 info`, which runs what it lists, cannot meet it.
"""

from torch import Tensor

from k5kernels.attention.engine import Call
from k5kernels.attention.nabla import Nabla
from k5kernels.block_mask import BlockMask
from k5kernels.ops.hopper_attention import hopper_attention, why_not
from k5kernels.ops.nabla_mask import nabla_bits
from k5kernels.profiling import stage


class NablaHopper(Nabla):
    """As "nabla"; forward by the kernels for Hopper, backward by those of "nabla"."""

    def __init__(self, pairs: bool = True) -> None:
        """pairs: whether two neighbouring query blocks share the key blocks they read ("nabla_hopper"), or each reads
        its own ("nabla_hopper_single")."""
        self.name = "nabla_hopper" if pairs else "nabla_hopper_single"
        self.pairs = pairs

    def why_not(self, call: Call) -> str | None:
        """What "nabla" says, then GPU, triton, dtype, head dim and blocks."""
        if reason := super().why_not(call):
            return reason
        layout = call.mask.layout if isinstance(call.mask, BlockMask) else call.layout
        assert layout is not None  # by Nabla.why_not
        return why_not(call.device, call.dtype, call.head_dim, layout)

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention inside each clip, over the blocks kept."""
        if isinstance(call.mask, BlockMask):
            layout = call.mask.layout
            bits, offsets = _bits_of(call.mask, *q.shape[:2])
        else:
            assert call.layout is not None  # by why_not
            layout = call.layout
            with stage("NABLA mask"):
                bits, offsets = nabla_bits(q, k, layout, call.thr, call.sta)
        with stage("block-sparse attention"):
            return hopper_attention(q, k, v, bits, offsets, layout, pairs=self.pairs)


def _bits_of(mask: BlockMask, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """(bits, offsets) of every sample and head, whether or not the mask has its own for each."""
    from k5kernels.triton.block_mask import lists_to_bits  # triton is there: `why_not` has looked

    bits = lists_to_bits(mask.offsets, mask.indices)
    return bits.expand(batch, heads, -1, -1), mask.offsets.expand(batch, heads, -1)
