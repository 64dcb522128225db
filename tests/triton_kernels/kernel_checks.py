"""Checks of launchers against the definitions, for the kernels that compute in floating point."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from dense_attention import far_apart
from tolerances import assert_error_bounded
from torch import Tensor


def assert_kernel_accurate(kernel: Callable[..., Any], reference: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """The results err about as little as the reference at their precision, against it in float64; twice the same."""
    in_float64 = [value.double() if isinstance(value, Tensor) else value for value in arguments]
    actual, again, eager, exact = (
        results(function(*given))
        for function, given in (
            (kernel, arguments),
            (kernel, arguments),
            (reference, arguments),
            (reference, in_float64),
        )
    )
    for one, other, rounded, truth in zip(actual, again, eager, exact, strict=True):
        assert torch.equal(one, other)
        assert_error_bounded(one, rounded, truth)


def results(returned: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned)


def spread(x: Tensor) -> Tensor:
    """x [1, S, d] with so much memory between its tokens that 32 bits do not count to token 64."""
    return far_apart([x[None]])[0][0]
