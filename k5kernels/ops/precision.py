"""The dtype that operators compute in, whatever dtype their tensors are stored in."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where one of the tensors is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def upcast(x: Tensor) -> Tensor:
    """x in its compute dtype: itself where it has that already."""
    return x.to(compute_dtype(x))


def in_float32(tensors: int) -> Mapping[str, Callable[..., bool]]:
    """The condition, as `Accepts` takes it, of a kernel that computes in float32 alone.

    tensors: how many of the operator's first arguments are tensors.
    """
    return {"no tensor in float64": lambda *arguments: torch.float64 not in {x.dtype for x in arguments[:tensors]}}


# The condition of a kernel whose element type serves both, as `Accepts` takes it; autograd never breaks it.
GRAD_LIKE_X: Mapping[str, Callable[..., bool]] = {
    "grad in the dtype of x": lambda grad, x, *rest: grad.dtype == x.dtype,
}
