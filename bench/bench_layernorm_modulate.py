"""`layernorm_modulate` at the width of Video Lite, against its eager and compiled reference and a copy."""

import torch

from bench.harness import COPY, compare, sum_tolerance
from k5kernels.ops.layernorm_modulate import (
    EPS,
    layernorm_modulate,
    layernorm_modulate_backward_reference,
    layernorm_modulate_reference,
)

B, S, D = 1, 12_288, 1792  # beyond every cache
ONE_CLIP = (0, S)
FORWARD_FLOORS = {torch.float32: {COPY: 0.9, "torch.compile": 1}, torch.bfloat16: {COPY: 0.85, "torch.compile": 1}}
BACKWARD_FLOORS = {COPY: 0.75, "torch.compile": 1.3}


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
        floors=FORWARD_FLOORS[dtype],
        bytes_moved=2 * x.nbytes,  # x is read, the result written; the modulation is small
    )


def test_layernorm_modulate_backward(benchmark, dtype):
    grad, x = (torch.randn(B, S, D).to(dtype) for _ in range(2))
    scale = torch.randn(B, D)
    rest = (EPS, (B, D), ONE_CLIP)
    exact = layernorm_modulate_backward_reference(grad.double(), x.double(), scale.double(), *rest)
    compiled = torch.compile(layernorm_modulate_backward_reference)

    def check(grads):
        for one, truth in zip(grads, exact, strict=True):
            relative = 8 * torch.finfo(one.dtype).eps if one.ndim == 3 else sum_tolerance(one.dtype, S)
            tolerance = relative * truth.abs().max().item()
            torch.testing.assert_close(one.double(), truth, rtol=0, atol=tolerance)

    compare(
        benchmark,
        f"grad [{B}, {S}, {D}]",
        {
            "ours": lambda: torch.ops.k5.layernorm_modulate_backward(grad, x, scale, *rest),
            "eager": lambda: layernorm_modulate_backward_reference(grad, x, scale, *rest),
            "torch.compile": lambda: compiled(grad, x, scale, *rest),
        },
        check,
        floors=BACKWARD_FLOORS,
        bytes_moved=3 * x.nbytes,  # grad and x are read, the gradient of x is written
    )
