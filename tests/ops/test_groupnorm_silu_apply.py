import pytest
import torch
from groupnorm_sizes import any_sizes
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_thread_count_changes_no_bit,
    nan_with_all_bits_set,
    outputs_and_gradients,
)
from tolerances import assert_matches

from k5kernels.ops.groupnorm_silu import groupnorm_silu
from k5kernels.ops.groupnorm_silu_apply import EPS, groupnorm_silu_apply, groupnorm_silu_apply_reference
from k5kernels.ops.groupnorm_statistics import GroupStatistics, groupnorm_statistics

DIFFERENTIABLE = (0, 1, 2, 3, 4)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs(shape, groups, dtype=torch.float32, device="cpu", channels_last=False, weight_dtype=None):
    """x, mean, variance, weight, bias and eps; the statistics are not those of x, and float32 holds them exactly."""
    random = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=random) + 1).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=FORMATS[x.ndim])
    mean = torch.randn(shape[0], groups, generator=random).double().to(device)
    variance = (1 + torch.rand(shape[0], groups, generator=random)).double().to(device)
    weight, bias = (torch.randn(shape[1], generator=random).to(device, weight_dtype or dtype) for _ in range(2))
    return x, mean, variance, weight, bias, EPS


def apply(x, mean, variance, weight, bias, eps):
    return groupnorm_silu_apply(x, GroupStatistics(1, mean, variance), weight, bias, eps)


def assert_about_as_accurate_as_eager(arguments):
    """With the statistics' gradients in float32: float64 holds them, but they are computed in float32."""
    x, mean, variance, *rest = arguments
    precision = torch.promote_types(x.dtype, torch.float32)

    def in_float64(function):
        return lambda x, mean, variance, *rest: function(x, mean.double(), variance.double(), *rest)

    arguments = (x, mean.to(precision), variance.to(precision), *rest)
    assert_accurate(in_float64(apply), in_float64(groupnorm_silu_apply_reference), arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@any_sizes
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, channels_last, B, groups, in_group, size):
    arguments = inputs((B, groups * in_group, *size), groups, dtype, device, channels_last)
    assert_about_as_accurate_as_eager(arguments)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (1, 8, 2, 2, 2, 2)])
def test_any_number_of_positions_dimensions(isa, device, shape):
    assert_about_as_accurate_as_eager(inputs(shape, 2, device=device))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_may_have_another_dtype(isa, device, dtype, channels_last):
    arguments = inputs((2, 8, 2, 3, 5), 4, dtype, device, channels_last, weight_dtype=torch.float32)
    assert_about_as_accurate_as_eager(arguments)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("place", ["mean", "weight", "bias"])
def test_a_nan_with_all_its_bits_set_stays_a_nan_in_bfloat16(isa, channels_last, place):
    x, *rest = inputs((1, 40, 3, 7), 4, torch.bfloat16, channels_last=channels_last, weight_dtype=torch.float32)
    terms = dict(zip(("mean", "variance", "weight", "bias"), rest, strict=False))
    terms[place].view(-1)[1] = nan_with_all_bits_set()
    out, grad_x, *_ = outputs_and_gradients(apply, (x, *terms.values(), EPS), DIFFERENTIABLE)
    of_nan = slice(10, 20) if place == "mean" else slice(1, 2)
    for result in (out, grad_x):
        assert result.isnan()[:, of_nan].all()
        assert result.isnan().sum() == result[:, of_nan].numel()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 3, 5, 7), 3), ((1, 8, 2, 11, 13), 4), ((2, 9, 1, 1), 3)])
def test_with_the_statistics_of_x_it_gives_the_bits_of_groupnorm_silu(isa, dtype, channels_last, shape, groups):
    if isa == "reference":
        pytest.skip("the reference of groupnorm_silu is PyTorch's GroupNorm, which rounds elsewhere")
    x, _, _, weight, bias, eps = inputs(shape, groups, dtype, channels_last=channels_last)
    out = groupnorm_silu_apply(x, groupnorm_statistics(x, groups), weight, bias, eps)
    torch.testing.assert_close(out, groupnorm_silu(x, weight, bias, groups, eps), rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_with_the_statistics_of_x_its_gradients_are_those_of_groupnorm_silu(isa, device, channels_last):
    x, _, _, weight, bias, eps = inputs((2, 12, 3, 5, 7), 3, torch.float64, device, channels_last)

    def two_passes(x, weight, bias):
        return groupnorm_silu_apply(x, groupnorm_statistics(x, 3), weight, bias, eps)

    actual = outputs_and_gradients(two_passes, (x, weight, bias), (0, 1, 2))
    expected = outputs_and_gradients(lambda *tensors: groupnorm_silu(*tensors, 3, eps), (x, weight, bias), (0, 1, 2))
    for one, other in zip(actual, expected, strict=True):
        assert_matches(one, other)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_of_frames_gets_the_bits_it_has_in_the_whole(isa, device, dtype, channels_last):
    x, mean, variance, weight, bias, eps = inputs((1, 8, 7, 5, 9), 4, dtype, device, channels_last)
    whole = apply(x, mean, variance, weight, bias, eps)
    chunks = [apply(chunk, mean, variance, weight, bias, eps) for chunk in x.split([1, 4, 2], dim=2)]
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, rtol=0, atol=0)


def test_values_are_centred_divided_by_the_deviation_scaled_shifted_and_activated(isa, device):
    x = torch.tensor([[[2.0, 6.0]]], device=device)
    statistics = GroupStatistics(2, *(torch.tensor([[v]], dtype=torch.float64, device=device) for v in (4.0, 4.0)))
    weight, bias = torch.tensor([2.0], device=device), torch.tensor([1.0], device=device)
    expected = torch.tensor([[[-1 / (1 + torch.e), 3 / (1 + torch.e**-3)]]], device=device)
    assert_matches(groupnorm_silu_apply(x, statistics, weight, bias, 0.0), expected)


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 8, 3, 4, 5)])
def test_channels_last_stays_channels_last(isa, device, shape):
    out, grad_x, *_ = outputs_and_gradients(apply, inputs(shape, 4, device=device, channels_last=True), DIFFERENTIABLE)
    assert out.is_contiguous(memory_format=FORMATS[len(shape)])
    assert grad_x.is_contiguous(memory_format=FORMATS[len(shape)])


def test_non_contiguous_inputs_give_the_same_result(isa, device):
    x, mean, variance, weight, bias, eps = inputs((2, 8, 5, 4), 4, device=device)
    strided = (
        x.mT.contiguous().mT,
        mean.mT.contiguous().mT,
        variance.mT.contiguous().mT,
        torch.stack([weight, weight], dim=1)[:, 0],
        torch.stack([bias, bias], dim=1)[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    out = apply(*strided, eps)
    assert out.is_contiguous()
    assert_matches(out, apply(x, mean, variance, weight, bias, eps))


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 0, 3, 4), (2, 0)])
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, shape):
    out, *grads = outputs_and_gradients(apply, inputs(shape, 4, device=device), DIFFERENTIABLE)
    assert out.shape == shape
    for grad in grads:
        assert not grad.any()


def test_gradients_are_the_derivatives():
    *tensors, eps = inputs((2, 4, 3, 2), 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *tensors: apply(*tensors, eps), [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(device, dtype, channels_last):
    *tensors, eps = inputs((2, 8, 2, 3, 4), 4, dtype, device, channels_last, weight_dtype=torch.float32)
    differentiable = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.k5.groupnorm_silu_apply, (*differentiable, eps))
    torch.library.opcheck(torch.ops.k5.groupnorm_silu_apply_backward, (torch.randn_like(tensors[0]), *tensors, eps))


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_compiled_graph_serves_all_sizes(device, channels_last):
    shapes = ((2, 12, 3, 5, 7), (3, 12, 2, 6, 8))
    argument_sets = [inputs(shape, 4, device=device, channels_last=channels_last) for shape in shapes]
    assert_compiled_equals_eager(apply, argument_sets, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
def test_thread_count_changes_no_bit(isa, set_threads, channels_last):
    if isa == "reference":
        pytest.skip("PyTorch's sums over a group are added in an order that depends on the threads")
    arguments = inputs((2, 24, 3, 40, 31), 4, channels_last=channels_last)
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(apply, arguments, DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


def statistics_of(*shape, variance=None, dtype=torch.float64):
    return GroupStatistics(1, torch.zeros(shape, dtype=dtype), torch.zeros(variance or shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x: expected a floating \[B, C, ...\], got torch.float32 \[8\]"),
        ({"statistics": statistics_of(2, 3)}, r"statistics.mean: .* divisor of the 8 channels of x, got .*\[2, 3\]"),
        ({"statistics": statistics_of(1, 4)}, r"statistics.mean: expected torch.float64 \[2, groups\].*got .*\[1, 4\]"),
        ({"statistics": statistics_of(2, 4, dtype=torch.float32)}, r"statistics.mean: .*got torch.float32"),
        (
            {"statistics": statistics_of(2, 4, variance=(2, 2))},
            r"statistics.variance: expected \[2, 4\] .*got \[2, 2\]",
        ),
        ({"weight": torch.zeros(4)}, r"weight: expected a floating \[8\], got torch.float32 \[4\]"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, r"bias: .*got torch.int64"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 8, 3), "statistics": statistics_of(2, 4)}
    with pytest.raises(ValueError, match=message):
        groupnorm_silu_apply(**{**good, "weight": torch.zeros(8), "bias": torch.zeros(8), **change})
