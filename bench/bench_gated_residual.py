"""`gated_residual` at the width of Video Lite, against its eager and compiled reference."""

import torch

from bench.harness import compare
from k5kernels.ops.gated_residual import gated_residual, gated_residual_reference

B, S, D = 1, 2048, 1792
ONE_CLIP = (0, S)


def test_gated_residual(benchmark, dtype):
    x, y = torch.randn(B, S, D).to(dtype), torch.randn(B, S, D).to(dtype)
    gate = torch.randn(B, D)
    exact = gated_residual_reference(x.double(), y.double(), gate.double(), ONE_CLIP)
    tolerance = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    compiled = torch.compile(gated_residual_reference)
    compare(
        benchmark,
        f"x [{B}, {S}, {D}]",
        {
            "ours": lambda: gated_residual(x, y, gate),
            "eager": lambda: gated_residual_reference(x, y, gate, ONE_CLIP),
            "torch.compile": lambda: compiled(x, y, gate, ONE_CLIP),
        },
        lambda out: torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance),
    )
