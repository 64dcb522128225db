"""`gated_residual` at the width of Video Lite, against its eager and compiled reference and a copy."""

import torch

from bench.harness import COPY, compare, sum_tolerance
from k5kernels.ops.gated_residual import (
    gated_residual,
    gated_residual_backward_reference,
    gated_residual_reference,
)

B, S, D = 1, 12_288, 1792  # beyond every cache
ONE_CLIP = (0, S)
FORWARD_FLOORS = {torch.float32: {COPY: 0.9, "torch.compile": 1}, torch.bfloat16: {COPY: 0.85, "torch.compile": 1}}
BACKWARD_FLOORS = {COPY: 0.75, "torch.compile": 1.3}


def inputs(dtype):
    return torch.randn(B, S, D).to(dtype), torch.randn(B, S, D).to(dtype), torch.randn(B, D)


def bytes_moved(dtype):
    """Two tensors are read and one is written, forward and backward; the gate is small."""
    return 3 * B * S * D * dtype.itemsize


def test_gated_residual(benchmark, dtype):
    x, y, gate = inputs(dtype)
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
        floors=FORWARD_FLOORS[dtype],
        bytes_moved=bytes_moved(dtype),
    )


def test_gated_residual_backward(benchmark, dtype):
    grad, y, gate = inputs(dtype)
    exact = gated_residual_backward_reference(grad.double(), y.double(), gate.double(), ONE_CLIP)
    compiled = torch.compile(gated_residual_backward_reference)

    def check(grads):
        for one, truth in zip(grads, exact, strict=True):
            relative = 4 * torch.finfo(one.dtype).eps if one.ndim == 3 else sum_tolerance(one.dtype, S)
            tolerance = relative * truth.abs().max().item()
            torch.testing.assert_close(one.double(), truth, rtol=0, atol=tolerance)

    compare(
        benchmark,
        f"grad [{B}, {S}, {D}]",
        {
            "ours": lambda: torch.ops.k5.gated_residual_backward(grad, y, gate, ONE_CLIP),
            "eager": lambda: gated_residual_backward_reference(grad, y, gate, ONE_CLIP),
            "torch.compile": lambda: compiled(grad, y, gate, ONE_CLIP),
        },
        check,
        floors=BACKWARD_FLOORS,
        bytes_moved=bytes_moved(dtype),
    )
