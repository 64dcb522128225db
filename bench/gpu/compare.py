"""What sections compare and time alike."""

from collections.abc import Callable

import torch
from torch import Tensor

# Two kernels that add bf16 products in different orders.
LARGEST_DIFFERENCE = 2e-2
BACKWARD_PRODUCTS = 3.5  # of forward and backward, against those of the forward: 7 matrix products instead of 2


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward, and the gradients of the leaves."""
    return torch.autograd.grad(function(*leaves), leaves, grad)


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raise AssertionError where two bf16 results differ by more than the order of their sums explains."""
    difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert difference <= LARGEST_DIFFERENCE, f"{what}: they differ by {difference:.1e} of their norm"
