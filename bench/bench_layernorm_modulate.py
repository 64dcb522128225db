"""`layernorm_modulate` at the width of Video Lite, against its eager and compiled reference."""

import torch

from bench.harness import compare
from k5kernels.ops.layernorm_modulate import EPS, layernorm_modulate, layernorm_modulate_reference

B, S, D = 1, 2048, 1792
ONE_CLIP = (0, S)


def test_layernorm_modulate(benchmark, dtype):
    x = torch.randn(B, S, D).to(dtype)
    shift, scale = torch.randn(B, D), torch.randn(B, D)
    exact = layernorm_modulate_reference(x.double(), shift.double(), scale.double(), EPS, ONE_CLIP)
    tolerance = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
    compiled = torch.compile(layernorm_modulate_reference)
    compare(
        benchmark,
        f"x [{B}, {S}, {D}]",
        {
            "ours": lambda: layernorm_modulate(x, shift, scale, EPS),
            "eager": lambda: layernorm_modulate_reference(x, shift, scale, EPS, ONE_CLIP),
            "torch.compile": lambda: compiled(x, shift, scale, EPS, ONE_CLIP),
        },
        lambda out: torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance),
    )
