import inspect

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from groupnorm_sizes import any_sizes
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_thread_count_changes_no_bit,
    nan_with_all_bits_set,
    outputs_and_gradients,
)
from tolerances import assert_matches
from torch.profiler import ProfilerActivity, profile

from k5kernels.ops.groupnorm_silu import (
    EPS,
    groupnorm_silu,
    groupnorm_silu_backward_reference,
    groupnorm_silu_reference,
)
from k5kernels.ops.groupnorm_silu_apply import groupnorm_silu_apply

DIFFERENTIABLE = (0, 1, 2)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs(shape, groups, dtype=torch.float32, device="cpu", channels_last=False, weight_dtype=None):
    random = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=random) + 1).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.ndim])
    weight, bias = (torch.randn(shape[1], generator=random).to(device, weight_dtype or dtype) for _ in range(2))
    return x, weight, bias, groups, EPS


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@any_sizes
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, channels_last, B, groups, in_group, size):
    arguments = inputs((B, groups * in_group, *size), groups, dtype, device, channels_last)
    assert_accurate(groupnorm_silu, groupnorm_silu_reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("operator", [groupnorm_silu, groupnorm_silu_apply])
def test_the_default_eps_is_that_of_the_released_vae(operator):
    released = HunyuanVideoResnetBlockCausal3D(32).norm1.eps
    assert inspect.signature(operator).parameters["eps"].default == released


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (1, 8, 2, 2, 2, 2)])
def test_any_number_of_positions_dimensions(isa, device, shape):
    arguments = inputs(shape, 2, device=device)
    assert_accurate(groupnorm_silu, groupnorm_silu_reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_may_have_another_dtype(isa, device, dtype, channels_last):
    arguments = inputs((2, 8, 2, 3, 5), 4, dtype, device, channels_last, weight_dtype=torch.float32)
    assert_accurate(groupnorm_silu, groupnorm_silu_reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_little_precision(isa, channels_last):
    if isa == "reference":
        pytest.skip("PyTorch's GroupNorm, which the reference calls, loses digits here where channels are last")
    x, *rest = inputs((1, 16, 3, 16, 16), 4, channels_last=channels_last)
    x = x + 300
    exact = groupnorm_silu(x.double(), *rest)
    torch.testing.assert_close(groupnorm_silu(x, *rest).double(), exact, rtol=1e-4, atol=1e-4)


def test_two_values_of_a_group_become_plus_and_minus_one_before_silu(isa, device):
    x = torch.tensor([[[1.0, 3.0]]], device=device)
    weight, bias = torch.tensor([2.0], device=device), torch.tensor([1.0], device=device)
    expected = torch.tensor([[[-1 / (1 + torch.e), 3 / (1 + torch.e**-3)]]], device=device)
    assert_matches(groupnorm_silu(x, weight, bias, 1, 0.0), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_do_not_touch_each_other(isa, device, channels_last):
    x, weight, bias, groups, eps = inputs((2, 12, 2, 3, 4), 3, device=device, channels_last=channels_last)
    whole = groupnorm_silu(x, weight, bias, groups, eps)
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        assert_matches(whole[:, part], groupnorm_silu(x[:, part], weight[part], bias[part], 1, eps))


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 8, 3, 4, 5)])
def test_channels_last_stays_channels_last(isa, device, shape):
    memory_format = CHANNELS_LAST[len(shape)]
    arguments = inputs(shape, 4, device=device, channels_last=True)
    out, grad_x, *_ = outputs_and_gradients(groupnorm_silu, arguments, DIFFERENTIABLE)
    assert out.is_contiguous(memory_format=memory_format)
    assert grad_x.is_contiguous(memory_format=memory_format)
    contiguous = groupnorm_silu(arguments[0].contiguous(), *arguments[1:])
    assert contiguous.is_contiguous()
    assert_matches(out, contiguous)


def test_a_channels_last_slice_gives_dense_channels_last(isa, device):
    x, *rest = inputs((2, 8, 5, 4, 3), 4, device=device, channels_last=True)
    out = groupnorm_silu(x[:, :, 1:], *rest)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert_matches(
        out, groupnorm_silu(x[:, :, 1:].contiguous(), *rest).contiguous(memory_format=torch.channels_last_3d)
    )


def test_other_strides_give_a_contiguous_result(isa, device):
    x, *rest = inputs((2, 8, 5, 4), 4, device=device)
    strided = x.mT.contiguous().mT
    arguments = (strided, *rest)
    out, grad_x, *_ = outputs_and_gradients(groupnorm_silu, arguments, DIFFERENTIABLE)
    assert out.is_contiguous()
    assert grad_x.is_contiguous()
    assert_matches(out, groupnorm_silu(x, *rest))


def test_very_large_values_saturate(isa, device):
    x = torch.tensor([-1.0, 1.0], device=device).repeat(8).view(1, 1, 4, 4)
    weight, bias = torch.tensor([300.0], device=device), torch.tensor([0.0], device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x_two = x.repeat(1, 2, 1, 1).contiguous(memory_format=memory_format)
        out = groupnorm_silu(x_two, weight.repeat(2), bias.repeat(2), 1, EPS)
        assert_matches(out, (300 * x_two).clamp(min=0))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("place", ["weight", "bias"])
def test_a_nan_with_all_its_bits_set_stays_a_nan_in_bfloat16(isa, channels_last, place):
    x, *affine, groups, eps = inputs(
        (1, 40, 3, 7), 4, torch.bfloat16, channels_last=channels_last, weight_dtype=torch.float32
    )
    affine[place == "bias"][1] = nan_with_all_bits_set()
    out, grad_x, *_ = outputs_and_gradients(groupnorm_silu, (x, *affine, groups, eps), DIFFERENTIABLE)
    for result, of_nan in ((out, slice(1, 2)), (grad_x, slice(10))):  # the gradient's sums are over a group
        assert result.isnan()[:, of_nan].all()
        assert result.isnan().sum() == result[:, of_nan].numel()


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 0, 3, 4)])
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, shape):
    out, *grads = outputs_and_gradients(groupnorm_silu, inputs(shape, 4, device=device), DIFFERENTIABLE)
    assert out.shape == shape
    for grad in grads:
        assert not grad.any()


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 0, 3, 4), (2, 0)])
def test_the_reference_serves_empty_sizes_on_every_device(device, shape):
    x, weight, bias, *rest = inputs(shape, 4, device=device)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        assert groupnorm_silu_reference(x, weight, bias, *rest).shape == shape
        grad_x, grad_weight, grad_bias = groupnorm_silu_backward_reference(x, x, weight, bias, *rest)
    # PyTorch's own kernel takes zero channels on the CPU and refuses them on CUDA: it must not be asked on either.
    assert not any("group_norm" in event.name for event in recorded.events())
    assert grad_x.shape == shape
    assert grad_weight.tolist() == grad_bias.tolist() == [0.0] * shape[1]


def test_gradients_are_the_derivatives():
    x, weight, bias, groups, eps = inputs((2, 4, 3, 2), 2, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *tensors: groupnorm_silu(*tensors, groups, eps),
        [tensor.requires_grad_() for tensor in (x, weight, bias)],
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(device, dtype, channels_last):
    x, weight, bias, *rest = inputs((2, 8, 2, 3, 4), 4, dtype, device, channels_last, weight_dtype=torch.float32)
    differentiable = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(torch.ops.k5.groupnorm_silu, (*differentiable, *rest))
    torch.library.opcheck(torch.ops.k5.groupnorm_silu_backward, (torch.randn_like(x), x, weight, bias, *rest))


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_compiled_graph_serves_all_sizes(device, channels_last):
    shapes = ((2, 8, 3, 4, 5), (3, 8, 2, 6, 7))
    argument_sets = [inputs(shape, 4, device=device, channels_last=channels_last) for shape in shapes]
    assert_compiled_equals_eager(groupnorm_silu, argument_sets, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_changes_no_bit(isa, set_threads, dtype, channels_last):
    if isa == "reference":
        pytest.skip("PyTorch's GroupNorm, which the reference calls, sums in an order that depends on the threads")
    # Weights in float32, whose gradients show the order of a sum that bfloat16 would round away.
    arguments = inputs((2, 24, 3, 40, 31), 4, dtype, channels_last=channels_last, weight_dtype=torch.float32)
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(groupnorm_silu, arguments, DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32, 4, 128, 160), (1, 48, 3, 101, 160)])  # of cache lines, of halves
def test_a_result_too_large_for_the_caches_is_as_accurate(isa, shape, dtype, channels_last):
    arguments = inputs(shape, 8, dtype, channels_last=channels_last)
    assert_accurate(groupnorm_silu, groupnorm_silu_reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_of_the_other_format_gives_the_same_result(isa, device, channels_last):
    x, *rest = inputs((2, 8, 5, 4), 4, device=device, channels_last=channels_last)
    grad = torch.randn_like(x)
    other = grad.contiguous(memory_format=torch.contiguous_format if channels_last else torch.channels_last)
    assert other.stride() != grad.stride()
    for one, expected in zip(
        torch.ops.k5.groupnorm_silu_backward(other, x, *rest),
        torch.ops.k5.groupnorm_silu_backward(grad, x, *rest),
        strict=True,
    ):
        assert one.stride() == expected.stride()
        assert_matches(one, expected)


def test_autocast_leaves_the_dtype_of_x(device):
    arguments = inputs((1, 8, 3, 4), 2, torch.bfloat16, device, weight_dtype=torch.float32)
    expected = outputs_and_gradients(groupnorm_silu, arguments, DIFFERENTIABLE)
    with torch.autocast(device, torch.bfloat16):
        actual = outputs_and_gradients(groupnorm_silu, arguments, DIFFERENTIABLE)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x: expected a floating \[B, C, ...\], got torch.float32 \[8\]"),
        ({"x": torch.zeros(2, 8, 3, dtype=torch.uint8)}, r"x: .*got torch.uint8"),
        ({"groups": 3}, r"groups: expected a divisor of the 8 channels of x, got 3"),
        ({"groups": 0}, r"groups: .*got 0"),
        ({"weight": torch.zeros(4)}, r"weight: expected a floating \[8\], got torch.float32 \[4\]"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, r"bias: .*got torch.int64"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 8, 3), "weight": torch.zeros(8), "bias": torch.zeros(8), "groups": 4, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        groupnorm_silu(**{**good, **change})
