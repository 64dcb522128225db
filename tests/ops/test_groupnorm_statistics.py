from functools import reduce

import pytest
import torch
from groupnorm_sizes import any_sizes
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_thread_count_changes_no_bit,
    outputs_and_gradients,
)
from tolerances import MERGED_STATISTICS, assert_matches

from k5kernels.ops.groupnorm_statistics import (
    GroupStatistics,
    groupnorm_statistics,
    groupnorm_statistics_reference,
)

DIFFERENTIABLE = (0,)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def activation(*shape, dtype=torch.float32, device="cpu", channels_last=False):
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1).to(device, dtype)
    return x.contiguous(memory_format=FORMATS[x.ndim]) if channels_last else x


def moments(x, groups):
    statistics = groupnorm_statistics(x, groups)
    return statistics.mean, statistics.variance


def rounded(function):
    """The statistics in float32 or better: float64 holds them, but they are computed in the former."""

    def rounded_moments(x, groups):
        return [values.to(torch.promote_types(x.dtype, torch.float32)) for values in function(x, groups)]

    return rounded_moments


def relative_error(actual, exact):
    """The largest error of mean and of variance, each in units of the group's deviation or variance."""
    mean = (actual.mean - exact.mean).abs() / exact.variance.sqrt()
    return max(mean.max().item(), ((actual.variance - exact.variance).abs() / exact.variance).max().item())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@any_sizes
def test_mean_and_variance_are_those_of_float64(isa, device, dtype, channels_last, B, groups, in_group, size):
    x = activation(B, groups * in_group, *size, dtype=dtype, device=device, channels_last=channels_last)
    exact = x.double().reshape(B, groups, -1)
    mean, variance = moments(x, groups)
    assert mean.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(mean, exact.mean(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, exact.var(-1, correction=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_err_about_as_little_as_eager_pytorch(isa, device, dtype, channels_last):
    x = activation(2, 12, 3, 5, 4, dtype=dtype, device=device, channels_last=channels_last)
    _, _, grad_x = outputs_and_gradients(moments, (x, 3), DIFFERENTIABLE)
    assert grad_x.dtype == dtype
    assert grad_x.is_contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
    assert_accurate(rounded(moments), rounded(groupnorm_statistics_reference), (x, 3), DIFFERENTIABLE)


def test_two_values_have_their_middle_and_the_square_of_half_their_distance(isa, device):
    x = torch.tensor([[[1.0, 3.0], [5.0, 11.0]]], device=device)
    statistics = groupnorm_statistics(x, 2)
    assert statistics.size == 2
    assert statistics.mean.tolist() == [[2.0, 8.0]]
    assert statistics.variance.tolist() == [[1.0, 9.0]]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[1, 4, 4, 2], [11], [1] * 11, [3, 8]])
def test_statistics_of_chunks_of_frames_merge_to_those_of_the_whole(isa, device, dtype, channels_last, chunks):
    x = activation(2, 8, 11, 9, 13, dtype=dtype, device=device, channels_last=channels_last)
    x = x + torch.arange(11, device=device, dtype=dtype)[:, None, None]  # chunks that differ
    whole = groupnorm_statistics(x, 4)
    merged = reduce(GroupStatistics.merge, [groupnorm_statistics(chunk, 4) for chunk in x.split(chunks, dim=2)])
    assert merged.size == whole.size == 2 * 11 * 9 * 13
    assert relative_error(merged, whole) < MERGED_STATISTICS[dtype]
    assert relative_error(merged, groupnorm_statistics(x.double(), 4)) < MERGED_STATISTICS[dtype]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_no_precision_in_chunks_either(isa, channels_last):
    x = activation(1, 16, 4, 16, 16, channels_last=channels_last) + 300
    merged = reduce(GroupStatistics.merge, [groupnorm_statistics(chunk, 4) for chunk in x.split(1, dim=2)])
    assert relative_error(merged, groupnorm_statistics(x.double(), 4)) < 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("first_values", [[0.0] * 16, [1e4], [-1000.0] * 40])
def test_values_that_begin_far_from_the_others_cost_no_precision(isa, channels_last, first_values):
    x = activation(1, 4, 1, 20, 31, channels_last=channels_last) + 1000
    x.flatten(2)[0, :, : len(first_values)] = torch.tensor(first_values)
    _, variance = moments(x, 2)
    _, exact = groupnorm_statistics_reference(x.double(), 2)
    torch.testing.assert_close(variance, exact, rtol=2e-6, atol=0)


def test_a_chunk_without_values_changes_nothing(isa, device):
    x = activation(2, 8, 3, 4, 5, device=device)
    whole, nothing = groupnorm_statistics(x, 4), groupnorm_statistics(x[:, :, :0], 4)
    assert nothing.size == 0
    for merged in (whole.merge(nothing), nothing.merge(whole)):
        assert merged.size == whole.size
        torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=0)
        torch.testing.assert_close(merged.variance, whole.variance, rtol=0, atol=0)
    assert nothing.merge(nothing).size == 0


def test_gradients_flow_through_merged_chunks():
    x = activation(1, 4, 3, 2, 2, dtype=torch.float64).requires_grad_()

    def merged(x):
        statistics = groupnorm_statistics(x[:, :, :1], 2).merge(groupnorm_statistics(x[:, :, 1:], 2))
        return statistics.mean, statistics.variance

    assert torch.autograd.gradcheck(merged, x)
    assert torch.autograd.gradcheck(lambda x: moments(x, 2), x)


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 0, 3, 4)])
def test_no_values_have_mean_and_variance_zero_and_no_gradient(isa, device, shape):
    mean, variance, grad_x = outputs_and_gradients(moments, (activation(*shape, device=device), 4), DIFFERENTIABLE)
    assert mean.shape == variance.shape == (shape[0], 4)
    assert not mean.any()
    assert not variance.any()
    assert grad_x.shape == shape


def test_non_contiguous_x_gives_the_same_result(isa, device):
    x = activation(2, 8, 5, 6, device=device)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    for one, other in zip(moments(strided, 4), moments(x, 4), strict=True):
        assert_matches(one, other)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(device, dtype, channels_last):
    x = activation(2, 8, 2, 3, 4, dtype=dtype, device=device, channels_last=channels_last)
    torch.library.opcheck(torch.ops.k5.groupnorm_statistics, (x.clone().requires_grad_(), 4))
    mean, variance = moments(x, 4)
    backward = (torch.randn_like(mean), torch.randn_like(variance), x, mean)
    torch.library.opcheck(torch.ops.k5.groupnorm_statistics_backward, backward)


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_compiled_graph_serves_all_sizes(device, channels_last):
    shapes = ((2, 8, 3, 4, 5), (3, 8, 2, 6, 7))
    argument_sets = [(activation(*shape, device=device, channels_last=channels_last), 4) for shape in shapes]
    assert_compiled_equals_eager(moments, argument_sets, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
def test_thread_count_changes_no_bit(isa, set_threads, channels_last):
    if isa == "reference":
        pytest.skip("PyTorch's var_mean, which the reference calls, sums in an order that depends on the threads")
    x = activation(2, 24, 3, 40, 31, channels_last=channels_last)
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(moments, (x, 4), DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x: expected a floating \[B, C, ...\], got torch.float32 \[8\]"),
        ({"x": torch.zeros(2, 8, 3, dtype=torch.uint8)}, r"x: .*got torch.uint8"),
        ({"groups": 3}, r"groups: expected a divisor of the 8 channels of x, got 3"),
        ({"groups": 0}, r"groups: .*got 0"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        groupnorm_statistics(**{"x": torch.zeros(2, 8, 3), "groups": 4, **change})
