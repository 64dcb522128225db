"""SageAttention: products in 8 bits, for inference, where its package is installed."""

from torch import Tensor

from k5kernels.attention.engine import PackageEngine


class SageAttention(PackageEngine):
    """For GPUs from Ampere on; 64, 96 and 128 are the head dims that all its releases take."""

    name = "sage"
    kind = "quantized"
    module = "sageattention"
    package = "sageattention (the extra k5kernels[sage])"
    lowest = (8, 0)
    head_dims = (64, 96, 128)
    has_backward = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """ "HND" is the package's name for [B, h, S, D]. Releases 1.x subtract from k in place: a copy for them."""
        from sageattention import sageattn

        return sageattn(q, k.clone(), v, tensor_layout="HND")
