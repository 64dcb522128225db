"""`groupnorm_silu` on a VAE activation in both memory formats, against its eager and compiled reference."""

import pytest
import torch

from bench.harness import compare
from k5kernels.ops.groupnorm_silu import EPS, groupnorm_silu, groupnorm_silu_reference

SHAPE, GROUPS = (1, 128, 5, 96, 96), 32
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def inputs(dtype, memory_format):
    x = torch.randn(SHAPE).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    return x, torch.randn(SHAPE[1]), torch.randn(SHAPE[1])


def in_float64(tensors):
    return [tensor.detach().double() for tensor in tensors]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_groupnorm_silu(benchmark, dtype, memory_format):
    x, weight, bias = inputs(dtype, memory_format)
    exact = groupnorm_silu_reference(x.double(), weight.double(), bias.double(), GROUPS, EPS)
    # PyTorch's own channels-last kernel is off by about 6e-6 of the largest value in float32.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5) * exact.abs().max().item()
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
    )


def test_groupnorm_silu_training(benchmark):
    """Forward and backward, channels last, as the VAE trains."""
    arguments = [tensor.requires_grad_() for tensor in inputs(torch.float32, "channels_last")]
    grad = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last_3d)

    def step(function, tensors=arguments, grad=grad):
        return torch.autograd.grad(function(*tensors, GROUPS, EPS), tensors, grad)

    exact = step(groupnorm_silu_reference, [t.requires_grad_() for t in in_float64(arguments)], grad.double())

    def check(grads):
        for one, truth in zip(grads, exact, strict=True):
            torch.testing.assert_close(one.double(), truth, rtol=0, atol=5e-5 * truth.abs().max().item())

    compare(
        benchmark,
        f"x {list(SHAPE)} float32 channels_last",
        {"ours": lambda: step(groupnorm_silu), "eager": lambda: step(groupnorm_silu_reference)},
        check,
    )
