"""PyTorch's own attention: on every device, in every dtype, with a mask of tokens."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from k5kernels.attention.engine import Call, DenseEngine
from k5kernels.block_mask import BlockMask


class SDPA(DenseEngine):
    """`torch.nn.functional.scaled_dot_product_attention`."""

    name = "sdpa"

    def why_not(self, call: Call) -> str | None:
        """Only a mask can be at fault: one of blocks, or one of tokens beside a layout."""
        if isinstance(call.mask, BlockMask):
            return "mask: it takes a bool tensor, got a BlockMask, which is for block-sparse attention"
        if call.mask is not None and call.layout is not None:
            return "mask: it takes a tensor or a layout, got both"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """mask broadcasts to [B, h, S, S_k]."""
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
