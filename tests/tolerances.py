"""How near two results must be: one table for all tests, and the rule for kernels.

The rule: against the same computation in float64, a kernel may err at most a small factor more than eager
PyTorch errs at the same precision. Small sizes can leave eager without any error by luck, so the last rounding, and a
few float32 roundings of what is computed on the way (numbers of order one in these tests), are always allowed.
"""

import torch
from torch import Tensor

# dtype of the result -> (relative, absolute)
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


# How far statistics merged from chunks may be from those of the whole, in units of the variance and its root. Values of
# few bits, as those of bfloat16, are all rounded the same way when a kernel subtracts a channel's first value.
MERGED_STATISTICS = {torch.float32: 3e-7, torch.bfloat16: 2e-6}


def assert_matches(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype, device and, within the table's tolerance, values."""
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_error_bounded(actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The rule above; `exact` is the float64 result, `eager` plain PyTorch's in the dtype of `actual`.

    A float64 result has no better truth to be measured against: the table serves.
    """
    if actual.dtype == torch.float64:
        return assert_matches(actual, exact)
    assert actual.dtype == eager.dtype, f"dtype: expected {eager.dtype}, got {actual.dtype}"
    assert actual.shape == exact.shape, f"shape: expected {list(exact.shape)}, got {list(actual.shape)}"
    if actual.numel() == 0:
        return
    error, eager_error = ((result.double() - exact).abs().max().item() for result in (actual, eager))
    largest = exact.abs().max().item()
    roundings = torch.finfo(actual.dtype).eps * largest + 8 * torch.finfo(torch.float32).eps * max(1.0, largest)
    bound = factor * eager_error + roundings
    assert error <= bound, f"error {error:.3e} is over {bound:.3e} ({factor} x eager's {eager_error:.3e})"
