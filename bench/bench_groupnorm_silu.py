"""`groupnorm_silu` on a VAE activation in both memory formats, against its eager and compiled reference and a copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.harness import COPY, compare, in_float64
from bench.silu_limit import SiluLimit
from k5kernels.ops.groupnorm_silu import (
    EPS,
    groupnorm_silu,
    groupnorm_silu_backward_reference,
    groupnorm_silu_reference,
)
from k5kernels.ops.groupnorm_silu_apply import groupnorm_silu_apply
from k5kernels.ops.groupnorm_silu_padded import groupnorm_silu_padded, groupnorm_silu_padded_reference
from k5kernels.ops.groupnorm_statistics import groupnorm_statistics

SHAPE, GROUPS = (1, 128, 17, 128, 128), 32  # beyond every cache
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
FORWARD_FLOORS = {COPY: 0.7, "eager": 1.5}
CAUSAL_PAD = (2, 1, 1)  # of a 3 x 3 x 3 convolution
LIMIT = "limit"  # of this processor, by a bare loop
PADDED_FLOORS = {COPY: 0.7, "apply, then pad": 1.5}
BACKWARD_FLOORS = {COPY: 0.75, "torch.compile": 1.3}

both_formats = pytest.mark.parametrize("memory_format", FORMATS)


def activation(dtype, memory_format):
    return torch.randn(SHAPE).to(dtype).contiguous(memory_format=FORMATS[memory_format])


def affine():
    return torch.randn(SHAPE[1]), torch.randn(SHAPE[1])


@both_formats
def test_groupnorm_silu(benchmark, dtype, memory_format):
    x, (weight, bias) = activation(dtype, memory_format), affine()
    exact = groupnorm_silu_reference(x.double(), weight.double(), bias.double(), GROUPS, EPS)
    # PyTorch's own channels-last kernel is off by 1.1e-5 of the largest value in float32, ours by 1.3e-7.
    tolerance = max(4 * torch.finfo(dtype).eps, 2e-5) * exact.abs().max().item()
    compiled = torch.compile(groupnorm_silu_reference)
    compare(
        benchmark,
        f"x {list(SHAPE)}",
        {
            "ours": lambda: groupnorm_silu(x, weight, bias, GROUPS, EPS),
            "eager": lambda: groupnorm_silu_reference(x, weight, bias, GROUPS, EPS),
            "torch.compile": lambda: compiled(x, weight, bias, GROUPS, EPS),
        },
        lambda out: torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance),
        floors=FORWARD_FLOORS,
        bytes_moved=3 * x.nbytes,  # x is read for its statistics, then read and written
    )


@both_formats
def test_groupnorm_silu_padded(benchmark, dtype, memory_format):
    x, (weight, bias) = activation(dtype, memory_format), affine()
    statistics = groupnorm_statistics(x, GROUPS)
    given = (statistics.mean, statistics.variance, weight.double(), bias.double(), CAUSAL_PAD, EPS)
    exact = groupnorm_silu_padded_reference(x.double(), *given)
    frames, rows, columns = CAUSAL_PAD

    def apply_then_pad():
        out = groupnorm_silu_apply(x, statistics, weight, bias, EPS)
        return F.pad(out, (columns, columns, rows, rows, frames, 0), mode="replicate")

    def check(out_and_exact):
        out, exact = out_and_exact
        tolerance = 8 * torch.finfo(dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)

    variants = {
        "ours": lambda: (groupnorm_silu_padded(x, statistics, weight, bias, CAUSAL_PAD, EPS), exact),
        "apply, then pad": lambda: (apply_then_pad(), exact),
    }
    if dtype == torch.bfloat16:
        limit = SiluLimit().forward(x.numel(), exact.numel() - x.numel())
        variants[LIMIT] = lambda: (limit(), limit.expected)
    compare(
        benchmark,
        f"x {list(SHAPE)}",
        variants,
        check,
        floors=PADDED_FLOORS,
        bytes_moved=x.nbytes + exact.numel() * x.element_size(),
    )


@both_formats
def test_groupnorm_silu_backward(benchmark, dtype, memory_format):
    grad, x, (weight, bias) = activation(dtype, memory_format), activation(dtype, memory_format), affine()
    arguments = (grad, x, weight, bias, GROUPS, EPS)
    exact = groupnorm_silu_backward_reference(*in_float64(arguments))
    compiled = torch.compile(groupnorm_silu_backward_reference)

    def check(grads_and_exact):
        for one, truth in zip(*grads_and_exact, strict=True):
            tolerance = max(4 * torch.finfo(one.dtype).eps, 5e-5) * truth.abs().max().item()
            torch.testing.assert_close(one.double(), truth, rtol=0, atol=tolerance)

    variants: dict[str, Callable[[], tuple[Any, Any]]] = {
        "ours": lambda: (torch.ops.k5.groupnorm_silu_backward(*arguments), exact),
        "eager": lambda: (groupnorm_silu_backward_reference(*arguments), exact),
        "torch.compile": lambda: (compiled(*arguments), exact),
    }
    if dtype == torch.bfloat16 and memory_format == "channels_last":  # contiguous groups are read from the caches
        limit = SiluLimit().backward(x.numel())
        variants[LIMIT] = lambda: ([limit()], [limit.expected])
    compare(
        benchmark,
        f"grad {list(SHAPE)}",
        variants,
        check,
        floors=BACKWARD_FLOORS,
        # x is read for its statistics, x and grad for the sums over a group, and again for the gradient that is written
        bytes_moved=6 * x.nbytes,
    )
