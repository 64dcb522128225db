"""`qk_norm_rope` at the width of Video Lite, against its eager and compiled reference and a copy."""

import torch

from bench.harness import COPY, compare, in_float64, sum_tolerance
from k5kernels.ops.qk_norm_rope import (
    EPS,
    qk_norm_rope,
    qk_norm_rope_backward_reference,
    qk_norm_rope_reference,
)

B, S, HEADS, HEAD_DIM = 1, 12_288, 28, 64  # beyond every cache
FORWARD_FLOORS = {torch.float32: {COPY: 0.9, "torch.compile": 2}, torch.bfloat16: {COPY: 0.8, "torch.compile": 2}}
BACKWARD_FLOORS = {COPY: 0.75, "torch.compile": 1.3}


def inputs(dtype):
    """q, k, their weights, cos, sin and eps."""
    q, k = (torch.randn(B, S, HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    angles = 6.3 * torch.rand(S, HEAD_DIM // 2)
    return q, k, torch.randn(HEAD_DIM), torch.randn(HEAD_DIM), angles.cos(), angles.sin(), EPS


def check_against(exact):
    def check(outputs):
        for out, truth in zip(outputs, exact, strict=True):
            of_weight = out.ndim == 1
            relative = sum_tolerance(out.dtype, B * S * HEADS) if of_weight else 8 * torch.finfo(out.dtype).eps
            tolerance = relative * truth.abs().max().item()
            torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)

    return check


def test_qk_norm_rope(benchmark, dtype):
    arguments = inputs(dtype)
    exact = qk_norm_rope_reference(*in_float64(arguments))
    compiled = torch.compile(qk_norm_rope_reference)
    compare(
        benchmark,
        f"q, k [{B}, {S}, {HEADS}, {HEAD_DIM}]",
        {
            "ours": lambda: qk_norm_rope(*arguments),
            "eager": lambda: qk_norm_rope_reference(*arguments),
            "torch.compile": lambda: compiled(*arguments),
        },
        check_against(exact),
        floors=FORWARD_FLOORS[dtype],
        bytes_moved=4 * arguments[0].nbytes,  # q and k are read, both results written; the rotation is small
    )


def test_qk_norm_rope_backward(benchmark, dtype):
    arguments = (*inputs(dtype)[:2], *inputs(dtype))
    exact = qk_norm_rope_backward_reference(*in_float64(arguments))
    compiled = torch.compile(qk_norm_rope_backward_reference)
    compare(
        benchmark,
        f"grads of q, k [{B}, {S}, {HEADS}, {HEAD_DIM}]",
        {
            "ours": lambda: torch.ops.k5.qk_norm_rope_backward(*arguments),
            "eager": lambda: qk_norm_rope_backward_reference(*arguments),
            "torch.compile": lambda: compiled(*arguments),
        },
        check_against(exact),
        floors=BACKWARD_FLOORS,
        bytes_moved=6 * arguments[0].nbytes,  # of q and of k: two tensors are read and one is written
    )
