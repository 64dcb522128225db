"""Mean and variance of groups, and the gradient through them, by the Triton kernels."""

import pytest
import torch
from activations import activation, make_small, parameters
from kernel_checks import assert_kernel_accurate
from tolerances import MERGED_STATISTICS

from k5kernels.ops.groupnorm_statistics import groupnorm_statistics_backward_reference
from k5kernels.triton import groupnorm_statistics as kernels

FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    make_small(monkeypatch)


def exact_moments(x, groups):
    values = x.double().reshape(x.shape[0], groups, -1)
    return values.mean(-1), values.var(-1, correction=0)


def assert_exact(x, groups, tolerance):
    """Errors in units of a group's deviation and variance; two runs give the same bits."""
    mean, variance = kernels.groupnorm_statistics(x, groups)
    for one, other in zip((mean, variance), kernels.groupnorm_statistics(x, groups), strict=True):
        assert torch.equal(one, other)
    exact_mean, exact_variance = exact_moments(x, groups)
    assert mean.dtype == variance.dtype == torch.float64
    assert ((mean - exact_mean).abs() <= tolerance * exact_variance.sqrt() + 1e-12).all()
    assert ((variance - exact_variance).abs() <= tolerance * exact_variance).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 1, 5, 5), 2), ((1, 3, 1, 7), 3), ((1, 1, 1, 1), 1)])
def test_the_moments_are_those_of_float64(shape, groups, dtype, channels_last):
    assert_exact(activation(*shape, dtype=dtype, channels_last=channels_last), groups, MERGED_STATISTICS[dtype])


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_no_precision(channels_last):
    assert_exact(activation(1, 4, 2, 5, 6, channels_last=channels_last) + 300, 2, 1e-5)


def test_a_first_value_far_from_all_others_costs_little():
    x = activation(1, 4, 9, 9, channels_last=True)
    x[:, :, 0, 0] = 1e4
    assert_exact(x, 2, 1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, torch.float16])
def test_the_gradient(dtype, channels_last):
    x = activation(2, 4, 1, 5, 3, dtype=dtype, channels_last=channels_last)
    mean, variance, *_ = parameters(x, 2)
    arguments = (variance, mean, x, mean)
    assert_kernel_accurate(kernels.groupnorm_statistics_backward, groupnorm_statistics_backward_reference, arguments)
    assert kernels.groupnorm_statistics_backward(*arguments).stride() == x.stride()


def test_other_strides_are_copied():
    x = activation(1, 4, 5, 6)
    for strided in (x.mT.contiguous().mT, activation(1, 4, 6, 6, channels_last=True)[:, :, 1:]):
        assert_exact(strided, 2, MERGED_STATISTICS[FLOAT])


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 0, 3, 4)])
def test_no_values_have_mean_and_variance_zero_and_no_gradient(shape):
    x = torch.zeros(shape)
    mean, variance = kernels.groupnorm_statistics(x, 4)
    assert mean.shape == variance.shape == (shape[0], 4)
    assert not mean.any()
    assert not variance.any()
    assert kernels.groupnorm_statistics_backward(mean, variance, x, mean).shape == shape
