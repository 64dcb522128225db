"""Shift, scale and gate of adaLN (§5.3): one row a sample, [B, d], or one a token, [B, S, d]."""

import torch
from torch import Tensor


def check_modulation(name: str, modulation: Tensor, x: Tensor) -> None:
    """Raise ValueError where `modulation` fits no x [B, S, d]."""
    per_sample = (x.shape[0], x.shape[2])
    if modulation.shape not in (x.shape, per_sample) or not modulation.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating {list(per_sample)} (one row a sample) or {list(x.shape)} (one a token), "
            f"got {modulation.dtype} {list(modulation.shape)}"
        )


def per_token(modulation: Tensor) -> Tensor:
    """In float32 or better, with a sequence dimension that broadcasts against [B, S, d]."""
    wide = modulation.to(torch.promote_types(modulation.dtype, torch.float32))
    return wide if wide.ndim == 3 else wide[:, None]


def sum_to_modulation(grad: Tensor, ndim: int) -> Tensor:
    """The gradient of a modulation of `ndim` dimensions from that of its broadcast form [B, S, d]."""
    return (grad if ndim == 3 else grad.sum(1)).clone(memory_format=torch.contiguous_format)
