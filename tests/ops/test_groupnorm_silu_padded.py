"""`groupnorm_silu_padded`: the values of `groupnorm_silu_apply`, copied as the convolution's replicate padding does."""

import pytest
import torch
import torch.nn.functional as F
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_thread_count_changes_no_bit,
    nan_with_all_bits_set,
    outputs_and_gradients,
)

from k5kernels.ops.groupnorm_silu_apply import EPS, groupnorm_silu_apply, groupnorm_silu_apply_reference
from k5kernels.ops.groupnorm_silu_padded import add_copies, groupnorm_silu_padded
from k5kernels.ops.groupnorm_statistics import GroupStatistics

DIFFERENTIABLE = (0, 1, 2, 3, 4)
CAUSAL = (2, 1, 1)


def inputs(shape, groups, pad=CAUSAL, dtype=torch.float32, device="cpu", channels_last=False):
    """x, mean, variance, weight, bias, pad and eps; float32 holds the statistics exactly."""
    random = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=random) + 1).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    mean = torch.randn(shape[0], groups, generator=random).double().to(device)
    variance = (1 + torch.rand(shape[0], groups, generator=random)).double().to(device)
    weight, bias = (torch.randn(shape[1], generator=random).to(device) for _ in range(2))
    return x, mean, variance, weight, bias, pad, EPS


def padded(x, mean, variance, weight, bias, pad, eps):
    return groupnorm_silu_padded(x, GroupStatistics(1, mean, variance), weight, bias, pad, eps)


def pad_of_pytorch(x, pad):
    t, h, w = pad
    return F.pad(x, (w, w, h, h, t, 0), mode="replicate")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", [(2, 1, 1), (0, 1, 1), (3, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize("shape", [(2, 12, 3, 5, 7), (1, 8, 1, 1, 1), (1, 3, 2, 1, 4), (1, 16, 1, 3, 9)])
def test_the_values_are_those_of_apply_with_pytorchs_padding(isa, device, dtype, channels_last, pad, shape):
    x, mean, variance, weight, bias, pad, eps = inputs(shape, 1, pad, dtype, device, channels_last)
    plain = groupnorm_silu_apply(x, GroupStatistics(1, mean, variance), weight, bias, eps)
    out = padded(x, mean, variance, weight, bias, pad, eps)
    torch.testing.assert_close(out, pad_of_pytorch(plain, pad), rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_results_and_gradients_are_about_those_of_eager_pytorch(isa, device, dtype, channels_last):
    def both_in_float32(function):  # float64 holds gradients of statistics, but they are computed in float32
        return lambda x, mean, variance, *rest: function(x, mean.double(), variance.double(), *rest)

    def eager(x, mean, variance, weight, bias, pad, eps):
        return pad_of_pytorch(groupnorm_silu_apply_reference(x, mean, variance, weight, bias, eps), pad)

    x, mean, variance, *rest = inputs((2, 12, 3, 5, 7), 3, CAUSAL, dtype, device, channels_last)
    arguments = (x, mean.float(), variance.float(), *rest)
    assert_accurate(both_in_float32(padded), both_in_float32(eager), arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("pad", [(2, 1, 1), (0, 3, 0), (1, 0, 2)])
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1)])
def test_gradients_of_copies_go_to_their_origin(pad, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    out = pad_of_pytorch(x, pad)
    grad = torch.randn_like(out)
    kept = grad.clone()
    torch.testing.assert_close(add_copies(grad, pad), torch.autograd.grad(out, x, grad)[0])
    torch.testing.assert_close(grad, kept, rtol=0, atol=0)  # what it is given stays as it is


def assert_bits_of_apply_then_pad(arguments, set_threads):
    """Of a result larger than the caches, on one thread and on two."""
    x, mean, variance, weight, bias, pad, eps = arguments
    plain = pad_of_pytorch(groupnorm_silu_apply(x, GroupStatistics(1, mean, variance), weight, bias, eps), pad)
    for threads in (1, 2):
        set_threads(threads)
        out = padded(*arguments)
        assert out.nbytes > 4 << 20
        torch.testing.assert_close(out, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "pad"), [((1, 64, 4, 80, 80), CAUSAL), ((2, 64, 2, 1, 1200), (1, 2, 3))])
def test_channels_last_results_larger_than_the_caches_have_the_same_bits_on_any_threads(
    isa, set_threads, dtype, shape, pad
):
    assert_bits_of_apply_then_pad(inputs(shape, 4, pad, dtype, channels_last=True), set_threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "pad"),
    [
        ((1, 11, 3, 199, 203), CAUSAL),
        ((1, 124, 1, 240, 73), (0, 0, 1)),
        ((1, 90, 2, 160, 80), (1, 2, 0)),  # rows without copies of their ends
        ((1, 90, 1, 60, 33), (0, 0, 200)),  # copies beyond a cache line
        ((1, 300, 2, 300, 9), (1, 0, 2)),  # rows within a cache line
    ],
)
def test_rows_of_any_width_larger_than_the_caches_have_the_same_bits_on_any_threads(
    isa, set_threads, dtype, shape, pad
):
    assert_bits_of_apply_then_pad(inputs(shape, 1, pad, dtype), set_threads)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("place", ["mean", "weight", "bias"])
def test_a_nan_with_all_its_bits_set_stays_a_nan_in_bfloat16(isa, channels_last, place):
    x, *rest = inputs((1, 40, 2, 3, 7), 4, CAUSAL, torch.bfloat16, channels_last=channels_last)
    terms = dict(zip(("mean", "variance", "weight", "bias"), rest, strict=False))
    terms[place].view(-1)[1] = nan_with_all_bits_set()
    out = padded(x, *terms.values(), CAUSAL, EPS)
    of_nan = slice(10, 20) if place == "mean" else slice(1, 2)
    assert out.isnan()[:, of_nan].all()
    assert out.isnan().sum() == out[:, of_nan].numel()


def test_channels_last_stays_channels_last(isa, device):
    out, grad_x, *_ = outputs_and_gradients(
        padded, inputs((2, 8, 3, 4, 5), 4, device=device, channels_last=True), DIFFERENTIABLE
    )
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert grad_x.is_contiguous(memory_format=torch.channels_last_3d)


def test_non_contiguous_inputs_give_the_same_result(isa, device):
    x, mean, variance, weight, bias, pad, eps = inputs((2, 8, 2, 5, 4), 4, device=device)
    strided = (x.mT.contiguous().mT, mean.mT.contiguous().mT, variance.mT.contiguous().mT)
    assert not any(tensor.is_contiguous() for tensor in strided)
    out = padded(*strided, weight, bias, pad, eps)
    assert out.is_contiguous()
    torch.testing.assert_close(out, padded(x, mean, variance, weight, bias, pad, eps), rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "pad"), [((0, 8, 2, 3, 4), CAUSAL), ((2, 8, 0, 4, 4), (0, 1, 1))])
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, shape, pad):
    out, *grads = outputs_and_gradients(padded, inputs(shape, 4, pad, device=device), DIFFERENTIABLE)
    assert out.shape == (*shape[:2], pad[0] + shape[2], 2 * pad[1] + shape[3], 2 * pad[2] + shape[4])
    assert not any(grad.any() for grad in grads)


def test_gradients_are_the_derivatives():
    *tensors, pad, eps = inputs((2, 4, 2, 3, 2), 2, dtype=torch.float64)
    weights = [tensor.double().requires_grad_() for tensor in tensors]
    torch.autograd.gradcheck(lambda *tensors: padded(*tensors, pad, eps), weights)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_passes(device, channels_last):
    *tensors, pad, eps = inputs((2, 8, 2, 3, 4), 4, CAUSAL, torch.bfloat16, device, channels_last)
    differentiable = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.k5.groupnorm_silu_padded, (*differentiable, pad, eps))


@pytest.mark.slow  # 30 seconds of a compiler
def test_one_compiled_graph_serves_all_sizes(device):
    argument_sets = [
        inputs(shape, 4, device=device, channels_last=True) for shape in ((2, 12, 3, 5, 7), (3, 12, 2, 6, 8))
    ]
    assert_compiled_equals_eager(padded, argument_sets, DIFFERENTIABLE)


def test_thread_count_changes_no_bit(isa, set_threads):
    if isa == "reference":
        pytest.skip("PyTorch's sums over a group are added in an order that depends on the threads")
    arguments = inputs((2, 24, 3, 20, 31), 4, channels_last=True)
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(padded, arguments, DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3, 3)}, r"x: expected \[B, C, T, H, W\], got \[2, 8, 3, 3\]"),
        ({"pad": (2, 1)}, r"pad: expected three numbers of at least 0 .*got \(2, 1\)"),
        ({"pad": (2, -1, 1)}, r"pad: expected three numbers of at least 0 .*got \(2, -1, 1\)"),
        ({"x": torch.zeros(2, 8, 0, 3, 3)}, r"pad: \(2, 1, 1\) asks for copies where x \[2, 8, 0, 3, 3\] has nothing"),
        ({"weight": torch.zeros(4)}, r"weight: expected a floating \[8\], got torch.float32 \[4\]"),
    ],
)
def test_bad_input_is_named(change, message):
    statistics = GroupStatistics(1, *(torch.ones(2, 4, dtype=torch.float64) for _ in range(2)))
    good = {"x": torch.zeros(2, 8, 3, 3, 3), "statistics": statistics, "pad": CAUSAL}
    with pytest.raises(ValueError, match=message):
        groupnorm_silu_padded(**{**good, "weight": torch.zeros(8), "bias": torch.zeros(8), **change})
