"""FlashAttention, versions 2 to 4, where its package is installed."""

from torch import Tensor

from k5kernels.attention.engine import PackageEngine


class FlashAttention4(PackageEngine):
    """For GPUs from Hopper on; its own package, which shares the name `flash_attn` with version 2."""

    name = "flash4"
    module = "flash_attn.cute"
    package = "FlashAttention-4 (pip install --pre flash-attn-4)"
    lowest = (9, 0)
    head_dims = range(8, 129, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The package takes and gives [B, S, h, D]; it gives (out, lse), of which lse may be None."""
        from flash_attn.cute import flash_attn_func

        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


class FlashAttention3(PackageEngine):
    """For Hopper GPUs; built from the folder `hopper` of flash-attention's sources."""

    name = "flash3"
    module = "flash_attn_interface"
    package = "FlashAttention-3 (flash-attention's hopper folder)"
    lowest = (9, 0)
    highest = (9, 0)
    head_dims = range(8, 257, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The package takes and gives [B, S, h, D]; some of its releases give (out, lse)."""
        from flash_attn_interface import flash_attn_func

        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


class FlashAttention2(PackageEngine):
    """For GPUs from Ampere on."""

    name = "flash2"
    module = "flash_attn"
    package = "flash-attn (the extra k5kernels[flash])"
    lowest = (8, 0)
    head_dims = range(8, 257, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The package takes and gives [B, S, h, D]."""
        from flash_attn import flash_attn_func

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
