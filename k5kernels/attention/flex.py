"""NABLA's mask run by PyTorch's FlexAttention: for comparison, and where our kernels are not wanted."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from k5kernels.attention.engine import Call, Engine
from k5kernels.block_mask import BlockMask
from k5kernels.ops.nabla_mask import nabla_mask


class Flex(Engine):
    """`torch.nn.attention.flex_attention`, compiled, over the blocks that NABLA keeps; every block has P² tokens."""

    name = "flex"
    kind = "sparse"

    def why_not(self, call: Call) -> str | None:
        """It needs CUDA and blocks of one size, which sides that are multiples of the block's side give."""
        if call.device.type != "cuda":
            return f"it runs on CUDA (elsewhere it fills the whole matrix), the tensors are on {call.device.type}"
        if call.mask is not None and not isinstance(call.mask, BlockMask):
            return f"mask: it takes a BlockMask, got {type(call.mask).__name__}"
        layout = call.mask.layout if isinstance(call.mask, BlockMask) else call.layout
        if layout is None:
            return "layout: it needs the TokenLayout of the sequence, got None"
        side = layout.block_side
        if any(H % side or W % side for _, H, W in layout.clips):
            return f"layout: it takes clips whose sides are multiples of {side} tokens"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention inside each clip, over the blocks kept."""
        mask = call.mask
        if not isinstance(mask, BlockMask):
            assert call.layout is not None  # by why_not
            mask = nabla_mask(q, k, call.layout, call.thr, call.sta)
        return _compiled()(q, k, v, block_mask=mask.to_flex())


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # which loads PyTorch's compiler

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled
