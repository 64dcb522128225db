import inspect

import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5TransformerDecoderBlock
from hypothesis import example, given
from hypothesis import strategies as st
from modulations import LENGTHS, PER, clip_starts_for, layout_for, layout_of, modulation_shape, per_token
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_equals_its_parts,
    assert_thread_count_changes_no_bit,
    nan_with_all_bits_set,
    outputs_and_gradients,
)
from tolerances import assert_matches

from k5kernels import TokenLayout
from k5kernels.ops.layernorm_modulate import EPS, layernorm_modulate, layernorm_modulate_reference

DIFFERENTIABLE = (0, 1, 2)


def inputs(B, lengths, d, per="sample", dtype=torch.float32, device="cpu", modulation_dtype=None):
    """x, shift, scale and eps for B sequences of clips of these lengths; one number stands for one clip."""
    lengths = [lengths] if isinstance(lengths, int) else lengths
    random = torch.Generator().manual_seed(0)
    shape = modulation_shape(per, B, lengths, d)
    x = 3 * torch.randn(B, sum(lengths), d, generator=random) + 1
    shift, scale = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    modulation_dtype = modulation_dtype or dtype
    return x.to(device, dtype), shift.to(device, modulation_dtype), scale.to(device, modulation_dtype), EPS


def reference(x, shift, scale, eps, layout=None):
    clip_starts = [0, x.shape[1]] if layout is None else layout.clip_tokens
    return layernorm_modulate_reference(x, shift, scale, eps, clip_starts)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(B=st.integers(1, 3), lengths=LENGTHS, d=st.integers(1, 80))
@example(B=1, lengths=[1], d=1)
@example(B=2, lengths=[1, 1, 5], d=131)
@example(B=1, lengths=[2, 1], d=1792)
@example(B=2, lengths=[150, 64, 3], d=19)
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, per, B, lengths, d):
    arguments = (*inputs(B, lengths, d, per, dtype, device), layout_for(per, lengths))
    assert_accurate(layernorm_modulate, reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("per", ["sample", "clip"])
def test_a_row_of_a_clip_or_sample_serves_each_of_its_tokens(isa, device, per):
    lengths = [3, 1, 4]
    x, shift, scale, eps = inputs(2, lengths, 11, per, device=device)
    expected = layernorm_modulate(x, *(per_token(rows, per, 2, lengths) for rows in (shift, scale)), eps)
    actual = layernorm_modulate(x, shift, scale, eps, layout_for(per, lengths))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_rows_of_a_modulation_are_ordered_by_sample_then_by_clip(isa, device):
    x, scale = torch.ones(2, 3, 1, device=device), torch.zeros(4, 1, device=device)
    shift = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=device)
    out = layernorm_modulate(x, shift, scale, EPS, TokenLayout([(1, 1, 2), (1, 1, 1)]))
    assert out[..., 0].tolist() == [[1.0, 1.0, 2.0], [3.0, 3.0, 4.0]]


def test_a_layout_of_one_clip_is_the_same_as_none(isa, device):
    x, shift, scale, eps = inputs(3, 5, 9, device=device)
    expected = layernorm_modulate(x, shift, scale, eps)
    torch.testing.assert_close(layernorm_modulate(x, shift, scale, eps, layout_of([5])), expected, rtol=0, atol=0)


def test_the_default_eps_is_that_of_the_released_models():
    block = Kandinsky5TransformerDecoderBlock(model_dim=8, time_dim=8, ff_dim=8, head_dim=8)
    assert inspect.signature(layernorm_modulate).parameters["eps"].default == block.self_attention_norm.eps


def test_modulation_may_be_wider_than_x(isa, device):
    arguments = inputs(2, 3, 20, dtype=torch.bfloat16, device=device, modulation_dtype=torch.float32)
    assert_accurate(layernorm_modulate, reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("per", ["sample", "clip"])
def test_one_modulation_may_have_a_row_a_token_and_the_other_not(isa, device, per):
    x, shift, _, _ = inputs(2, [1, 2], 20, per, device=device)
    scale = inputs(2, [1, 2], 20, per="token", device=device)[2]
    layout = layout_for(per, [1, 2])
    for arguments in ((x, shift, scale, EPS, layout), (x, scale, shift, EPS, layout)):
        assert_accurate(layernorm_modulate, reference, arguments, DIFFERENTIABLE)


def test_float16_and_float64_are_served_too(device):
    for dtype in (torch.float16, torch.float64):
        arguments = inputs(2, 3, 20, dtype=dtype, device=device)
        assert_accurate(layernorm_modulate, reference, arguments, DIFFERENTIABLE)


def test_a_row_is_normalized_then_scaled_then_shifted(isa, device):
    x = torch.tensor([[[1.0, 3.0]]], device=device)
    shift, scale = torch.tensor([[10.0, 20.0]], device=device), torch.tensor([[1.0, 3.0]], device=device)
    expected = torch.tensor([[[-1.0 * 2 + 10, 1.0 * 4 + 20]]], device=device)
    assert_matches(layernorm_modulate(x, shift, scale, eps=0.0), expected)


def test_a_large_mean_costs_no_precision(isa):
    x, shift, scale, _ = inputs(1, 4, 256)
    assert_accurate(layernorm_modulate, reference, (x + 1e4, shift, scale, EPS), DIFFERENTIABLE)


@pytest.mark.parametrize("outliers", [1, 40])
def test_first_values_unlike_the_rest_of_a_row_cost_no_precision(isa, outliers):
    x, shift, scale, eps = inputs(2, 3, 256)
    x[..., :outliers] += 300
    assert_accurate(layernorm_modulate, reference, (x, shift, scale, eps), DIFFERENTIABLE)


def test_samples_do_not_touch_each_other(isa):
    x, shift, scale, eps = inputs(3, 5, 24)
    whole = layernorm_modulate(x, shift, scale, eps)
    for b in range(3):
        alone = layernorm_modulate(x[b : b + 1], shift[b : b + 1], scale[b : b + 1], eps)
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(0, [3], 8), (2, [0], 8), (2, [3], 0), (0, [0], 0), (0, [2, 1], 8), (2, [2, 1], 0)])
@pytest.mark.parametrize("per", PER)
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, sizes, per):
    B, lengths, d = sizes
    layout = layout_for(per, lengths) if all(lengths) else None
    arguments = (*inputs(*sizes, per, device=device), layout)
    out, *grads = outputs_and_gradients(layernorm_modulate, arguments, DIFFERENTIABLE)
    assert out.shape == (B, sum(lengths), d)
    for grad in grads:
        assert not grad.any()


def test_non_contiguous_inputs_give_the_same_result(isa, device):
    x, shift, scale, eps = inputs(2, 6, 10, per="token", device=device)
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


def test_slices_of_all_modulations_of_a_block_give_the_same_bits(isa, device):
    x, shift, scale, eps = inputs(2, [2, 3], 8, per="clip", device=device)
    parts = torch.cat([shift, scale, shift], dim=-1).split(8, dim=-1)[:2]
    assert not any(part.is_contiguous() for part in parts)
    layout = layout_of([2, 3])
    expected = layernorm_modulate(x, shift, scale, eps, layout)
    torch.testing.assert_close(layernorm_modulate(x, *parts, eps, layout), expected, rtol=0, atol=0)


def test_a_nan_stays_in_its_row(isa, device):
    x, shift, scale, eps = inputs(1, 3, 12, dtype=torch.bfloat16, device=device)
    x[0, 1, 5] = float("nan")
    out = layernorm_modulate(x, shift, scale, eps)
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()


def test_a_nan_with_all_its_bits_set_stays_a_nan_in_bfloat16(isa):
    x, shift, scale, eps = inputs(2, 3, 40, dtype=torch.bfloat16, modulation_dtype=torch.float32)
    scale[1, 5] = nan_with_all_bits_set()
    _, grad_x, *_ = outputs_and_gradients(layernorm_modulate, (x, shift, scale, eps), DIFFERENTIABLE)
    assert grad_x[1].isnan().all()
    assert grad_x[0].isfinite().all()


def test_results_are_rounded_to_the_nearest_bfloat16_denormal_ones_too(isa):
    """With a scale of -1 the result is the shift: any float32 numbers, and such as are as near to one bfloat16 as to
    another."""
    random = torch.Generator().manual_seed(0)
    highest, normal = 0x7F7F << 16, 1 << 23  # bits of finite numbers; of the first one that is not denormal
    any_bits, denormal = (torch.randint(bound, (64,), generator=random) for bound in (highest, normal))
    ties = torch.randint(highest >> 16, (55,), generator=random) * 0x10000 + 0x8000
    shift = torch.cat([any_bits, denormal, ties]).int().view(torch.float32)
    shift = torch.stack([shift, -shift])
    x = torch.randn(2, 3, shift.shape[1], generator=random).bfloat16()
    out = layernorm_modulate(x, shift, torch.full_like(shift, -1))
    assert torch.equal(out, shift[:, None].bfloat16().expand_as(out))


@pytest.mark.parametrize("per", PER)
def test_gradients_are_the_derivatives(per):
    arguments = inputs(2, [2, 1], 5, per, dtype=torch.float64)[:3]
    torch.autograd.gradcheck(
        lambda *tensors: layernorm_modulate(*tensors, EPS, layout_for(per, [2, 1])),
        [tensor.requires_grad_() for tensor in arguments],
    )


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(device, per, dtype):
    x, shift, scale, eps = inputs(2, [1, 2], 12, per, dtype, device)
    clip_starts = clip_starts_for(per, [1, 2])
    differentiable = [tensor.clone().requires_grad_() for tensor in (x, shift, scale)]
    torch.library.opcheck(torch.ops.k5.layernorm_modulate, (*differentiable, eps, clip_starts))
    backward = (torch.randn_like(x), x, scale, eps, list(shift.shape), clip_starts)
    torch.library.opcheck(torch.ops.k5.layernorm_modulate_backward, backward)


@pytest.mark.parametrize("per", ["sample", "token"])
def test_one_compiled_graph_serves_all_sizes(device, per):
    argument_sets = [inputs(*sizes, per, device=device) for sizes in ((2, 5, 16), (3, 7, 24))]
    assert_compiled_equals_eager(layernorm_modulate, argument_sets, DIFFERENTIABLE)


def test_one_compiled_graph_serves_all_lengths_of_the_clips(device):
    def modulate(x, shift, scale, eps, *lengths):
        return layernorm_modulate(x, shift, scale, eps, layout_of(lengths))

    argument_sets = [
        (*inputs(B, lengths, d, "clip", device=device), *lengths)
        for B, lengths, d in ((2, [3, 5], 16), (3, [6, 4], 24))
    ]
    assert_compiled_equals_eager(modulate, argument_sets, DIFFERENTIABLE)


@pytest.mark.parametrize("per", PER)
def test_thread_count_changes_no_bit(isa, set_threads, per):
    arguments = (*inputs(2, [150, 70], 257, per), layout_for(per, [150, 70]))
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(layernorm_modulate, arguments, DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


@pytest.mark.parametrize(("tokens", "width"), [(2048, 1792), (32768, 80), (32768, 72)])  # rows of lines, halves, less
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_too_large_for_the_caches_has_the_bits_of_its_parts(isa, dtype, tokens, width):
    x, shift, scale, eps = inputs(1, tokens, width, dtype=dtype)
    grad = x.flip(1).contiguous()

    def gradient(grad, x):
        return torch.ops.k5.layernorm_modulate_backward(grad, x, scale, eps, shift.shape, [0, x.shape[1]])[0]

    assert_equals_its_parts(lambda x: layernorm_modulate(x, shift, scale, eps), (x,))
    assert_equals_its_parts(gradient, (grad, x))


def test_a_gradient_of_any_strides_gives_the_same_bits(isa, device):
    x, shift, scale, eps = inputs(2, 6, 10, device=device)
    grad = x.flip(1).contiguous()
    strided = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    for one, other in zip(
        torch.ops.k5.layernorm_modulate_backward(strided, x, scale, eps, shift.shape, [0, 6]),
        torch.ops.k5.layernorm_modulate_backward(grad, x, scale, eps, shift.shape, [0, 6]),
        strict=True,
    ):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected a floating \[B, S, d\], got torch.float32 \[2, 3\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"x: .*got torch.int64"),
        ({"shift": torch.zeros(3, 4)}, r"shift: expected a floating \[2, 4\] .* or \[2, 3, 4\] .*got .*\[3, 4\]"),
        ({"scale": torch.zeros(2, 1, 4)}, r"scale: .*got torch.float32 \[2, 1, 4\]"),
        ({"layout": layout_of([2, 1])}, r"shift: expected a floating \[4, 4\] .*2 clips.* got torch.float32 \[2, 4\]"),
        ({"layout": layout_of([2, 2])}, r"layout: expected one of 3 tokens like x \[2, 3, 4\], got 4 tokens"),
        ({"scale": torch.zeros(2, 4, dtype=torch.int32)}, r"scale: .*got torch.int32"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 3, 4), "shift": torch.zeros(2, 4), "scale": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        layernorm_modulate(**{**good, **change})
