import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from modulations import LENGTHS, PER, clip_starts_for, layout_for, layout_of, modulation_shape, per_token
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_equals_its_parts,
    assert_thread_count_changes_no_bit,
    outputs_and_gradients,
)

from k5kernels import TokenLayout
from k5kernels.ops.gated_residual import gated_residual, gated_residual_reference

DIFFERENTIABLE = (0, 1, 2)


def inputs(B, lengths, d, per="sample", dtype=torch.float32, device="cpu", y_dtype=None, gate_dtype=None):
    """x, y and gate for B sequences of clips of these lengths; one number stands for one clip."""
    lengths = [lengths] if isinstance(lengths, int) else lengths
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, sum(lengths), d, generator=random) for _ in range(2))
    gate = torch.randn(modulation_shape(per, B, lengths, d), generator=random)
    return x.to(device, dtype), y.to(device, y_dtype or dtype), gate.to(device, gate_dtype or dtype)


def reference(x, y, gate, layout=None):
    return gated_residual_reference(x, y, gate, [0, x.shape[1]] if layout is None else layout.clip_tokens)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(B=st.integers(1, 3), lengths=LENGTHS, d=st.integers(1, 80))
@example(B=1, lengths=[1], d=1)
@example(B=2, lengths=[1, 1, 5], d=131)
@example(B=2, lengths=[150, 64, 3], d=19)
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, per, B, lengths, d):
    arguments = (*inputs(B, lengths, d, per, dtype, device), layout_for(per, lengths))
    assert_accurate(gated_residual, reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("per", ["sample", "clip"])
def test_a_row_of_a_clip_or_sample_serves_each_of_its_tokens(isa, device, per):
    lengths = [3, 1, 4]
    x, y, gate = inputs(2, lengths, 11, per, device=device)
    expected = gated_residual(x, y, per_token(gate, per, 2, lengths))
    torch.testing.assert_close(gated_residual(x, y, gate, layout_for(per, lengths)), expected, rtol=0, atol=0)


def test_the_rows_of_a_gate_are_ordered_by_sample_then_by_clip(isa, device):
    x, y = torch.zeros(2, 3, 1, device=device), torch.ones(2, 3, 1, device=device)
    gate = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=device)
    out = gated_residual(x, y, gate, TokenLayout([(1, 1, 2), (1, 1, 1)]))
    assert out[..., 0].tolist() == [[1.0, 1.0, 2.0], [3.0, 3.0, 4.0]]


def test_a_layout_of_one_clip_is_the_same_as_none(isa, device):
    x, y, gate = inputs(3, 5, 9, device=device)
    torch.testing.assert_close(gated_residual(x, y, gate, layout_of([5])), gated_residual(x, y, gate), rtol=0, atol=0)


def test_a_gate_per_token_needs_no_layout_and_may_have_one(isa, device):
    x, y, gate = inputs(2, [2, 3], 9, per="token", device=device)
    expected = gated_residual(x, y, gate)
    torch.testing.assert_close(gated_residual(x, y, gate, layout_of([2, 3])), expected, rtol=0, atol=0)


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
    assert_accurate(gated_residual, reference, arguments, DIFFERENTIABLE)


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


@pytest.mark.parametrize("sizes", [(0, [3], 8), (2, [0], 8), (2, [3], 0), (0, [0], 0), (0, [2, 1], 8), (2, [2, 1], 0)])
@pytest.mark.parametrize("per", PER)
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, sizes, per):
    B, lengths, d = sizes
    layout = layout_for(per, lengths) if all(lengths) else None
    arguments = (*inputs(*sizes, per, device=device), layout)
    out, *grads = outputs_and_gradients(gated_residual, arguments, DIFFERENTIABLE)
    assert out.shape == (B, sum(lengths), d)
    for grad in grads:
        assert not grad.any()


def test_non_contiguous_inputs_give_the_same_bits(isa, device):
    x, y, gate = inputs(2, 6, 10, per="token", device=device)
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


def test_a_slice_of_all_modulations_of_a_block_gives_the_same_bits(isa, device):
    x, y, gate = inputs(2, [2, 3], 8, per="clip", device=device)
    part = torch.cat([gate, gate, gate], dim=-1).split(8, dim=-1)[1]
    assert not part.is_contiguous()
    layout = layout_of([2, 3])
    torch.testing.assert_close(gated_residual(x, y, part, layout), gated_residual(x, y, gate, layout), rtol=0, atol=0)


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
    torch.testing.assert_close(gated_residual(x, y, gate), reference(x, y, gate), equal_nan=True, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("per", PER)
def test_gradients_are_the_derivatives(per):
    arguments = inputs(2, [2, 1], 5, per, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *tensors: gated_residual(*tensors, layout_for(per, [2, 1])),
        [tensor.requires_grad_() for tensor in arguments],
    )


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(device, per, y_dtype):
    x, y, gate = inputs(2, [1, 2], 12, per, device=device, y_dtype=y_dtype)
    clip_starts = clip_starts_for(per, [1, 2])
    differentiable = [tensor.clone().requires_grad_() for tensor in (x, y, gate)]
    torch.library.opcheck(torch.ops.k5.gated_residual, (*differentiable, clip_starts))
    torch.library.opcheck(torch.ops.k5.gated_residual_backward, (torch.randn_like(x), y, gate, clip_starts))


@pytest.mark.parametrize("per", ["sample", "token"])
def test_one_compiled_graph_serves_all_sizes(device, per):
    argument_sets = [inputs(*sizes, per, device=device) for sizes in ((2, 5, 16), (3, 7, 24))]
    assert_compiled_equals_eager(gated_residual, argument_sets, DIFFERENTIABLE)


def test_one_compiled_graph_serves_all_lengths_of_the_clips(device):
    def add(x, y, gate, *lengths):
        return gated_residual(x, y, gate, layout_of(lengths))

    argument_sets = [
        (*inputs(B, lengths, d, "clip", device=device), *lengths)
        for B, lengths, d in ((2, [3, 5], 16), (3, [6, 4], 24))
    ]
    assert_compiled_equals_eager(add, argument_sets, DIFFERENTIABLE)


@pytest.mark.parametrize("per", PER)
def test_thread_count_changes_no_bit(isa, set_threads, per):
    arguments = (*inputs(2, [150, 70], 257, per), layout_for(per, [150, 70]))
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(gated_residual, arguments, DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


@pytest.mark.parametrize(("tokens", "width"), [(2048, 1792), (32768, 80), (32768, 72)])  # rows of lines, halves, less
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_too_large_for_the_caches_has_the_bits_of_its_parts(isa, dtype, tokens, width):
    x, y, gate = inputs(1, tokens, width, dtype=dtype)
    assert_equals_its_parts(lambda x, y: gated_residual(x, y, gate), (x, y))
    assert_equals_its_parts(lambda x, y: torch.ops.k5.gated_residual_backward(x, y, gate, [0, x.shape[1]])[0], (x, y))


def test_a_gradient_of_any_strides_gives_the_same_bits(isa, device):
    grad, y, gate = inputs(2, 6, 10, device=device)
    strided = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    for one, other in zip(
        torch.ops.k5.gated_residual_backward(strided, y, gate, [0, 6]),
        torch.ops.k5.gated_residual_backward(grad, y, gate, [0, 6]),
        strict=True,
    ):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected a floating \[B, S, d\], got torch.float32 \[2, 3\]"),
        ({"y": torch.zeros(2, 1, 4)}, r"y: expected a floating \[2, 3, 4\] like x, got torch.float32 \[2, 1, 4\]"),
        ({"y": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"y: .*got torch.bool"),
        ({"gate": torch.zeros(4)}, r"gate: expected a floating \[2, 4\] .* or \[2, 3, 4\] .*got torch.float32 \[4\]"),
        ({"layout": layout_of([2, 1])}, r"gate: expected a floating \[4, 4\] .*2 clips.* got torch.float32 \[2, 4\]"),
        ({"layout": layout_of([2, 2])}, r"layout: expected one of 3 tokens like x \[2, 3, 4\], got 4 tokens"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 3, 4), "y": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        gated_residual(**{**good, **change})
