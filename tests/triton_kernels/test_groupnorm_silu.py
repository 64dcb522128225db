"""GroupNorm and SiLU with their gradients, by given statistics and by those of x, by the Triton kernels."""

import pytest
import torch
from activations import activation, make_small, parameters
from kernel_checks import assert_kernel_accurate, results

from k5kernels.ops.groupnorm_silu import groupnorm_silu_backward_reference, groupnorm_silu_reference
from k5kernels.ops.groupnorm_silu_apply import (
    EPS,
    groupnorm_silu_apply_backward_reference,
    groupnorm_silu_apply_reference,
)
from k5kernels.triton import groupnorm_silu as whole
from k5kernels.triton import groupnorm_silu_apply as by_given
from k5kernels.triton.groupnorm_statistics import groupnorm_statistics

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    make_small(monkeypatch)


def rounded(function):
    """Gradients of statistics in float32: float64 holds them, but they are computed in float32."""

    def in_float32(grad, x, *rest):
        return [values.to(torch.promote_types(x.dtype, FLOAT)) if values.dtype == torch.float64 else values
                for values in function(grad, x, *rest)]  # fmt: skip

    return in_float32


def assert_accurate(x, groups, weight_dtype=FLOAT):
    """All four launchers; x any dense tensor."""
    mean, variance, weight, bias = parameters(x, groups)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
    grad = torch.empty_like(x).copy_(activation(*x.shape, seed=1))
    given, own = (x, mean, variance, weight, bias, EPS), (x, weight, bias, groups, EPS)
    for kernel, reference, arguments in (
        (by_given.groupnorm_silu_apply, groupnorm_silu_apply_reference, given),
        (
            rounded(by_given.groupnorm_silu_apply_backward),
            rounded(groupnorm_silu_apply_backward_reference),
            (grad, *given),
        ),
        (whole.groupnorm_silu, groupnorm_silu_reference, own),
        (whole.groupnorm_silu_backward, groupnorm_silu_backward_reference, (grad, *own)),
    ):
        assert_kernel_accurate(kernel, reference, arguments)
        assert results(kernel(*arguments))[0].stride() == x.stride()


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "channels_last"),
    [(FLOAT, FLOAT, True), (BF16, FLOAT, True), (HALF, HALF, False)],
    ids=["float32, channels last", "bfloat16, channels last", "float16"],
)
def test_several_tiles_and_runs(dtype, weight_dtype, channels_last):
    assert_accurate(activation(1, 4, 1, 5, 5, dtype=dtype, channels_last=channels_last), 2, weight_dtype)


@pytest.mark.parametrize(("shape", "groups"), [((1, 1, 7, 7), 1), ((2, 2), 2), ((1, 2, 3, 1, 2, 2), 2)])
def test_any_number_of_positions(shape, groups):
    assert_accurate(activation(*shape), groups)


def test_with_the_statistics_of_x_the_bits_are_those_of_the_whole_operator():
    x = activation(2, 4, 2, 5, 3, dtype=BF16, channels_last=True)
    *_, weight, bias = parameters(x, 2)
    two_passes = by_given.groupnorm_silu_apply(x, *groupnorm_statistics(x, 2), weight, bias, EPS)
    assert torch.equal(two_passes, whole.groupnorm_silu(x, weight, bias, 2, EPS))


def test_other_strides_are_copied():
    x = activation(1, 4, 4, 3, channels_last=True)
    *_, weight, bias = parameters(x, 2)
    for strided in (x[:, :, 1:], x.mT.contiguous().mT):
        out = whole.groupnorm_silu(strided, weight, bias, 2, EPS)
        expected = groupnorm_silu_reference(strided, weight, bias, 2, EPS)
        assert out.stride() == expected.stride()
        assert torch.equal(out, whole.groupnorm_silu(torch.empty_like(expected).copy_(strided), weight, bias, 2, EPS))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_very_large_values_saturate():
    x = torch.tensor([-1e30, 1.0, 1e30, 0.0]).view(1, 1, 2, 2)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    out = by_given.groupnorm_silu_apply(x, zero, one, torch.ones(1), torch.zeros(1), 0.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 1 / (1 + torch.e**-1), 1e30, 0.0]))


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 0, 3, 4), (2, 0)])
def test_no_values(shape):
    x = torch.zeros(shape)
    mean, variance, weight, bias = parameters(x, 4)
    given, own = (x, mean, variance, weight, bias, EPS), (x, weight, bias, 4, EPS)
    assert by_given.groupnorm_silu_apply(*given).shape == whole.groupnorm_silu(*own).shape == shape
    for gradients, like in (
        (by_given.groupnorm_silu_apply_backward(x, *given), given[:5]),
        (whole.groupnorm_silu_backward(x, *own), own[:3]),
    ):
        assert [grad.shape for grad in gradients] == [tensor.shape for tensor in like]
        assert not any(grad.any() for grad in gradients)
