"""A block's linear layers without gradients against PyTorch's own product."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from bench.harness import compare, sum_tolerance
from k5kernels.presets import MODEL_SIZES
from model.crossdit import FeedForward
from model.linear import Linear

LITE = MODEL_SIZES["video_lite"]
TOKENS = (16, 384, 2688, 11904)
ROUNDS = 5

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="without AVX-512 they are PyTorch's own"
)
each_length = pytest.mark.parametrize("tokens", TOKENS)


def near(expected: Tensor) -> Callable[[Tensor], None]:
    """Where both add the terms of the widest sum one after the other, each in its own order."""
    tolerance = sum_tolerance(torch.float32, LITE.ff_dim) * expected.abs().max().item()

    def check(out: Tensor) -> None:
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)

    return check


@each_length
@torch.no_grad()
def test_mlp(benchmark, tokens):
    mlp, x = FeedForward(LITE), torch.randn(tokens, LITE.model_dim)

    def pytorchs() -> Tensor:
        return linear(gelu(linear(x, mlp.in_layer.weight)), mlp.out_layer.weight)

    variants = {"ours": lambda: mlp(x), "PyTorch's": pytorchs}
    work = 4.0 * tokens * LITE.model_dim * LITE.ff_dim
    sizes = f"[{tokens}, {LITE.model_dim}] → {LITE.ff_dim} → {LITE.model_dim}"
    compare(
        benchmark, sizes, variants, near(pytorchs()), dict.fromkeys(variants, work), {"PyTorch's": 1}, rounds=ROUNDS
    )


@each_length
@torch.no_grad()
def test_projection(benchmark, tokens):
    layer, x = Linear(LITE.model_dim, LITE.model_dim), torch.randn(tokens, LITE.model_dim)

    def pytorchs() -> Tensor:
        return linear(x, layer.weight, layer.bias)

    variants = {"ours": lambda: layer(x), "PyTorch's": pytorchs}
    work = 2.0 * tokens * LITE.model_dim**2
    sizes = f"[{tokens}, {LITE.model_dim}] → {LITE.model_dim}"
    compare(
        benchmark, sizes, variants, near(pytorchs()), dict.fromkeys(variants, work), {"PyTorch's": 1}, rounds=ROUNDS
    )
