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

from k5kernels.ops.gated_residual import gated_residual, gated_residual_reference

DIFFERENTIABLE = (0, 1, 2)


def inputs(B, S, d, per_token=False, dtype=torch.float32, device="cpu", y_dtype=None, gate_dtype=None):
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(B, S, d, generator=random), torch.randn(B, S, d, generator=random)
    gate = torch.randn((B, S, d) if per_token else (B, d), generator=random)
    return x.to(device, dtype), y.to(device, y_dtype or dtype), gate.to(device, gate_dtype or dtype)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(B=st.integers(1, 3), S=st.integers(1, 9), d=st.integers(1, 80))
@example(B=1, S=1, d=1)
@example(B=2, S=7, d=131)
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, per_token, B, S, d):
    arguments = inputs(B, S, d, per_token, dtype, device)
    assert_accurate(gated_residual, gated_residual_reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize(
    ("dtype", "y_dtype", "gate_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes_may_differ_and_the_result_has_that_of_x(isa, device, dtype, y_dtype, gate_dtype):
    arguments = inputs(2, 3, 20, dtype=dtype, device=device, y_dtype=y_dtype, gate_dtype=gate_dtype)
    assert gated_residual(*arguments).dtype == dtype
    assert_accurate(gated_residual, gated_residual_reference, arguments, DIFFERENTIABLE)


def test_each_element_is_x_plus_gate_times_y(isa, device):
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], device=device)
    y = torch.tensor([[[10.0, 20.0]], [[30.0, 40.0]]], device=device)
    gate = torch.tensor([[0.5, -1.0], [2.0, 0.0]], device=device)
    expected = torch.tensor([[[6.0, -18.0]], [[63.0, 4.0]]], device=device)
    torch.testing.assert_close(gated_residual(x, y, gate), expected, rtol=0, atol=0)


def test_bfloat16_is_rounded_once(isa, device):
    x = torch.tensor([[[1.0]]], dtype=torch.bfloat16, device=device)
    y = torch.tensor([[[0.00390625 * 1.0078125]]], dtype=torch.bfloat16, device=device)
    gate = torch.tensor([[1.0078125]], dtype=torch.bfloat16, device=device)
    exact = x.double() + gate.double() * y.double()
    torch.testing.assert_close(gated_residual(x, y, gate), exact.bfloat16(), rtol=0, atol=0)


def test_a_zero_gate_gives_x_back(isa, device):
    x, y, gate = inputs(2, 5, 33, dtype=torch.bfloat16, device=device)
    torch.testing.assert_close(gated_residual(x, y, torch.zeros_like(gate)), x, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, sizes, per_token):
    out, *grads = outputs_and_gradients(gated_residual, inputs(*sizes, per_token, device=device), DIFFERENTIABLE)
    assert out.shape == sizes
    for grad in grads:
        assert not grad.any()


def test_non_contiguous_inputs_give_the_same_bits(isa, device):
    x, y, gate = inputs(2, 6, 10, per_token=True, device=device)
    expected = gated_residual(x, y, gate)
    strided = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([y, y], dim=-1)[..., :10],
        gate.mT.contiguous().mT,
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = gated_residual(*strided)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_expanded_gate_serves_the_whole_batch(isa, device):
    x, y, gate = inputs(3, 4, 16, device=device)
    shared = gate[:1].expand(3, 16)
    torch.testing.assert_close(gated_residual(x, y, shared), gated_residual(x, y, shared.contiguous()), rtol=0, atol=0)


def test_the_result_is_new_memory(isa, device):
    x, y, gate = inputs(1, 2, 8, device=device)
    before = x.clone()
    gated_residual(x, y, gate).zero_()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_nan_and_infinity_come_through(isa, device):
    x, y, gate = inputs(1, 2, 12, dtype=torch.bfloat16, device=device)
    x[0, 0, 5], x[0, 0, 9], x[0, 1, 3] = float("nan"), float("inf"), float("-inf")
    torch.testing.assert_close(
        gated_residual(x, y, gate), gated_residual_reference(x, y, gate), equal_nan=True, rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_gradients_are_the_derivatives(per_token):
    arguments = inputs(2, 3, 5, per_token, dtype=torch.float64)
    torch.autograd.gradcheck(gated_residual, [tensor.requires_grad_() for tensor in arguments])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(isa, device, per_token, y_dtype):
    x, y, gate = inputs(2, 3, 12, per_token, device=device, y_dtype=y_dtype)
    differentiable = [tensor.clone().requires_grad_() for tensor in (x, y, gate)]
    torch.library.opcheck(torch.ops.k5.gated_residual, differentiable)
    torch.library.opcheck(torch.ops.k5.gated_residual_backward, (torch.randn_like(x), y, gate))


@pytest.mark.parametrize("per_token", [False, True])
def test_one_compiled_graph_serves_all_sizes(device, per_token):
    argument_sets = [inputs(*sizes, per_token, device=device) for sizes in ((2, 5, 16), (3, 7, 24))]
    assert_compiled_equals_eager(gated_residual, argument_sets, DIFFERENTIABLE)


def test_thread_count_changes_no_bit(isa, set_threads):
    arguments = inputs(2, 150, 257)
    assert_thread_count_changes_no_bit(lambda: gated_residual(*arguments), set_threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected a floating \[B, S, d\], got torch.float32 \[2, 3\]"),
        ({"y": torch.zeros(2, 1, 4)}, r"y: expected a floating \[2, 3, 4\] like x, got torch.float32 \[2, 1, 4\]"),
        ({"y": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"y: .*got torch.bool"),
        ({"gate": torch.zeros(4)}, r"gate: expected a floating \[2, 4\] .* or \[2, 3, 4\] .*got torch.float32 \[4\]"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 3, 4), "y": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        gated_residual(**{**good, **change})
