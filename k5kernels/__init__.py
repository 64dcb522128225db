"""The systems side of Kandinsky 5.0: sparse attention, fused operators, VAE encoding, caching, offload, planning.

Tensors of attention are [B, heads, S, D], as in PyTorch. The name `attention` is the function; its subpackage is
still imported from: `from k5kernels.attention import choose_engine`.
"""

from k5_command import stop_imports_in_one_line

stop_imports_in_one_line("k5")

from k5kernels import cache, offload, planner, vae
from k5kernels.attention import attention, nabla_attention
from k5kernels.block_mask import BlockMask
from k5kernels.ops.block_sparse_attention import block_sparse_attention
from k5kernels.ops.fractal import fractal_flatten, fractal_unflatten
from k5kernels.ops.gated_residual import gated_residual
from k5kernels.ops.groupnorm_silu import groupnorm_silu
from k5kernels.ops.layernorm_modulate import layernorm_modulate
from k5kernels.ops.nabla_mask import nabla_mask
from k5kernels.ops.qk_norm_rope import qk_norm_rope
from k5kernels.ops.sta_mask import sta_mask
from k5kernels.token_layout import TokenLayout

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "TokenLayout",
    "attention",
    "block_sparse_attention",
    "cache",
    "fractal_flatten",
    "fractal_unflatten",
    "gated_residual",
    "groupnorm_silu",
    "layernorm_modulate",
    "nabla_attention",
    "nabla_mask",
    "offload",
    "planner",
    "qk_norm_rope",
    "sta_mask",
    "vae",
]
