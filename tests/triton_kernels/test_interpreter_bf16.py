"""The interpreter's bfloat16 as these tests repair it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

N = 16


@triton.jit
def round_trip_kernel(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(tl.float32).to(tl.bfloat16))


@triton.jit
def double_kernel(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(tl.float32) * 2)


@triton.jit
def dot_kernel(a, b, target, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    tl.store(target + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def add_kernel(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at) + tl.load(source + at))


@triton.jit
def sum_kernel(source, target, N: tl.constexpr):
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, N))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_round_as_pytorch_does(dtype):
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 3e38])
    source = torch.cat([special, torch.randn(8, generator=torch.Generator().manual_seed(0))]).to(dtype)
    target = torch.empty(N, dtype=torch.bfloat16)
    round_trip_kernel[(1,)](source, target, N)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_float32_result_is_stored_rounded():
    source = torch.linspace(-3, 3, N)
    target = torch.empty(N, dtype=torch.bfloat16)
    double_kernel[(1,)](source, target, N)
    assert torch.equal(target, (2 * source).bfloat16())


def test_products_of_matrices_are_exact_and_added_in_float32():
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, N, generator=random).bfloat16() for _ in range(2))
    target = torch.empty(N, N)
    dot_kernel[(1,)](a, b, target, N)
    torch.testing.assert_close(target, a.float() @ b.float())


@pytest.mark.parametrize("kernel", [add_kernel, sum_kernel])
def test_arithmetic_in_bfloat16_is_refused(kernel):
    source = torch.ones(N, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="widen to float32"):
        kernel[(1,)](source, torch.empty_like(source), N)
