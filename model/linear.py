"""Linear layers of many tokens, by oneDNN where that is faster than the product behind PyTorch's own."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu as plain_gelu

# From so many rows on a product gains more from weights in oneDNN's own order than bringing them into it takes.
ROWS_TO_REORDER = 2048
# Private to PyTorch, whose compiler calls them. A release without them leaves `Linear` PyTorch's own.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)


class Linear(nn.Linear):
    """nn.Linear that computes in oneDNN where no gradient is asked for, in float32 on CPUs with AVX-512.

    There PyTorch calls MKL, which is slower on the AMD processors of docs/measured.md; held to AVX2, the two are equal.
    """

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[..., in_features] → [..., out_features]; gelu: of the result, which oneDNN applies before it is written."""
        if _plain(x, self.weight):
            out = super().forward(x)
            return plain_gelu(out) if gelu else out
        weight: Tensor = self.weight
        rows = x.numel() // self.in_features
        if rows >= ROWS_TO_REORDER:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "gelu" if gelu else "none", [], "none")


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own product is to be taken. What is compiled has it too: Inductor makes its own choice."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not HAS_ONEDNN
        or type(x) is not Tensor  # one that stands for a tensor, as a fake or a quantized one does
        or type(weight) is not nn.Parameter
        or not x.device.type == weight.device.type == "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    )
