"""`qk_norm_rope` at the width of Video Lite, against its eager and compiled reference."""

import torch
from torch import Tensor

from bench.harness import compare
from k5kernels.ops.qk_norm_rope import EPS, qk_norm_rope, qk_norm_rope_reference

B, S, HEADS, HEAD_DIM = 1, 2048, 28, 64


def in_float64(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return q.double(), k.double(), q_weight.double(), k_weight.double(), cos.double(), sin.double()


def test_qk_norm_rope(benchmark, dtype):
    q, k = (torch.randn(B, S, HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    weights = torch.randn(HEAD_DIM), torch.randn(HEAD_DIM)
    angles = 6.3 * torch.rand(S, HEAD_DIM // 2)
    arguments = (q, k, *weights, angles.cos(), angles.sin())
    exact = qk_norm_rope_reference(*in_float64(*arguments), EPS)
    compiled = torch.compile(qk_norm_rope_reference)

    def check(outputs):
        for out, truth in zip(outputs, exact, strict=True):
            tolerance = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
            torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)

    compare(
        benchmark,
        f"q, k [{B}, {S}, {HEADS}, {HEAD_DIM}]",
        {
            "ours": lambda: qk_norm_rope(*arguments),
            "eager": lambda: qk_norm_rope_reference(*arguments, EPS),
            "torch.compile": lambda: compiled(*arguments, EPS),
        },
        check,
    )
