"""Tokens of Video Lite's width into fractal order and back, checked against the index_select that defines it."""

import torch

from bench.harness import compare
from k5kernels import TokenLayout, fractal_flatten, fractal_unflatten
from k5kernels.ops.fractal import fractal_flatten_reference, fractal_unflatten_reference

GRID, D = (4, 32, 48), 1792
LAYOUT = TokenLayout((GRID,))


def test_fractal_flatten(benchmark, dtype):
    x = torch.randn(1, *GRID, D).to(dtype)
    exact = x.flatten(1, 3)[:, LAYOUT.permutation()]
    compare(
        benchmark,
        f"x {list(x.shape)}",
        {"ours": lambda: fractal_flatten(x, LAYOUT), "eager": lambda: fractal_flatten_reference(x, LAYOUT.block_side)},
        lambda out: torch.testing.assert_close(out, exact, rtol=0, atol=0),
    )


def test_fractal_unflatten(benchmark, dtype):
    x = torch.randn(1, LAYOUT.tokens, D).to(dtype)
    exact = x[:, LAYOUT.inverse_permutation()].unflatten(1, GRID)
    compare(
        benchmark,
        f"x {list(x.shape)}",
        {
            "ours": lambda: fractal_unflatten(x, LAYOUT),
            "eager": lambda: fractal_unflatten_reference(x, *GRID, LAYOUT.block_side),
        },
        lambda out: torch.testing.assert_close(out, exact, rtol=0, atol=0),
    )
