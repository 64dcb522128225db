import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_thread_count_changes_no_bit,
    outputs_and_gradients,
)
from tolerances import assert_matches

from k5kernels.ops.layernorm_modulate import layernorm_modulate, layernorm_modulate_reference

EPS = 1e-6
DIFFERENTIABLE = (0, 1, 2)


def inputs(B, S, d, per_token=False, dtype=torch.float32, device="cpu", modulation_dtype=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (B, S, d) if per_token else (B, d)
    x = 3 * torch.randn(B, S, d, generator=random) + 1
    shift, scale = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    modulation_dtype = modulation_dtype or dtype
    return x.to(device, dtype), shift.to(device, modulation_dtype), scale.to(device, modulation_dtype), EPS


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(B=st.integers(1, 3), S=st.integers(1, 9), d=st.integers(1, 80))
@example(B=1, S=1, d=1)
@example(B=2, S=7, d=131)
@example(B=1, S=3, d=1792)
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, per_token, B, S, d):
    arguments = inputs(B, S, d, per_token, dtype, device)
    assert_accurate(layernorm_modulate, layernorm_modulate_reference, arguments, DIFFERENTIABLE)


def test_modulation_may_be_wider_than_x(isa, device):
    arguments = inputs(2, 3, 20, dtype=torch.bfloat16, device=device, modulation_dtype=torch.float32)
    assert_accurate(layernorm_modulate, layernorm_modulate_reference, arguments, DIFFERENTIABLE)


def test_one_modulation_may_be_per_sample_and_the_other_per_token(isa, device):
    x, shift, _, _ = inputs(2, 3, 20, device=device)
    scale = inputs(2, 3, 20, per_token=True, device=device)[2]
    assert_accurate(layernorm_modulate, layernorm_modulate_reference, (x, shift, scale, EPS), DIFFERENTIABLE)


def test_float16_and_float64_are_served_too(device):
    for dtype in (torch.float16, torch.float64):
        arguments = inputs(2, 3, 20, dtype=dtype, device=device)
        assert_accurate(layernorm_modulate, layernorm_modulate_reference, arguments, DIFFERENTIABLE)


def test_a_row_is_normalized_then_scaled_then_shifted(isa, device):
    x = torch.tensor([[[1.0, 3.0]]], device=device)
    shift, scale = torch.tensor([[10.0, 20.0]], device=device), torch.tensor([[1.0, 3.0]], device=device)
    expected = torch.tensor([[[-1.0 * 2 + 10, 1.0 * 4 + 20]]], device=device)
    assert_matches(layernorm_modulate(x, shift, scale, eps=0.0), expected)


def test_a_large_mean_costs_no_precision(isa):
    x, shift, scale, _ = inputs(1, 4, 256)
    arguments = (x + 1e4, shift, scale, EPS)
    assert_accurate(layernorm_modulate, layernorm_modulate_reference, arguments, DIFFERENTIABLE)


def test_samples_do_not_touch_each_other(isa):
    x, shift, scale, eps = inputs(3, 5, 24)
    whole = layernorm_modulate(x, shift, scale, eps)
    for b in range(3):
        alone = layernorm_modulate(x[b : b + 1], shift[b : b + 1], scale[b : b + 1], eps)
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, sizes, per_token):
    out, *grads = outputs_and_gradients(layernorm_modulate, inputs(*sizes, per_token, device=device), DIFFERENTIABLE)
    assert out.shape == sizes
    for grad in grads:
        assert not grad.any()


def test_non_contiguous_inputs_give_the_same_result(isa, device):
    x, shift, scale, eps = inputs(2, 6, 10, per_token=True, device=device)
    expected = outputs_and_gradients(layernorm_modulate, (x, shift, scale, eps), DIFFERENTIABLE)
    strided = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        shift.mT.contiguous().mT,
        torch.cat([scale, scale], dim=-1)[..., :10],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = outputs_and_gradients(layernorm_modulate, (*strided, eps), DIFFERENTIABLE)
    for one, other in zip(actual, expected, strict=True):
        assert_matches(one, other)
    assert actual[0].is_contiguous()


def test_expanded_modulation_serves_the_whole_batch(isa, device):
    x, shift, scale, eps = inputs(3, 4, 16, device=device)
    shared = (shift[:1].expand(3, 16), scale[:1].expand(3, 16))
    copied = tuple(tensor.contiguous() for tensor in shared)
    torch.testing.assert_close(layernorm_modulate(x, *shared, eps), layernorm_modulate(x, *copied, eps), rtol=0, atol=0)


def test_a_nan_stays_in_its_row(isa, device):
    x, shift, scale, eps = inputs(1, 3, 12, dtype=torch.bfloat16, device=device)
    x[0, 1, 5] = float("nan")
    out = layernorm_modulate(x, shift, scale, eps)
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()


def test_gradients_are_the_derivatives():
    arguments = inputs(2, 3, 5, dtype=torch.float64)[:3]
    torch.autograd.gradcheck(
        lambda *tensors: layernorm_modulate(*tensors, EPS), [tensor.requires_grad_() for tensor in arguments]
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(isa, device, per_token, dtype):
    x, shift, scale, eps = inputs(2, 3, 12, per_token, dtype, device)
    differentiable = [tensor.clone().requires_grad_() for tensor in (x, shift, scale)]
    torch.library.opcheck(torch.ops.k5.layernorm_modulate, (*differentiable, eps))
    torch.library.opcheck(
        torch.ops.k5.layernorm_modulate_backward, (torch.randn_like(x), x, scale, eps, list(shift.shape))
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_one_compiled_graph_serves_all_sizes(device, per_token):
    argument_sets = [inputs(*sizes, per_token, device=device) for sizes in ((2, 5, 16), (3, 7, 24))]
    assert_compiled_equals_eager(layernorm_modulate, argument_sets, DIFFERENTIABLE)


def test_thread_count_changes_no_bit(isa, set_threads):
    arguments = inputs(2, 150, 257)
    assert_thread_count_changes_no_bit(lambda: layernorm_modulate(*arguments), set_threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected a floating \[B, S, d\], got torch.float32 \[2, 3\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"x: .*got torch.int64"),
        ({"shift": torch.zeros(3, 4)}, r"shift: expected a floating \[2, 4\] .* or \[2, 3, 4\] .*got .*\[3, 4\]"),
        ({"scale": torch.zeros(2, 1, 4)}, r"scale: .*got torch.float32 \[2, 1, 4\]"),
        ({"scale": torch.zeros(2, 4, dtype=torch.int32)}, r"scale: .*got torch.int32"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 3, 4), "shift": torch.zeros(2, 4), "scale": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        layernorm_modulate(**{**good, **change})
