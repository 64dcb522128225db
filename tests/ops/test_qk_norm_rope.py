import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention
from hypothesis import example, given
from hypothesis import strategies as st
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_equals_its_parts,
    assert_thread_count_changes_no_bit,
    nan_with_all_bits_set,
    outputs_and_gradients,
)
from tolerances import assert_matches

from k5kernels.ops.qk_norm_rope import EPS, qk_norm_rope, qk_norm_rope_reference

DIFFERENTIABLE = (0, 1, 2, 3)


def inputs(B, S, h, D, dtype=torch.float32, device="cpu", weight_dtype=None):
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, S, h, D, generator=random).to(device, dtype) for _ in range(2))
    weights = (torch.randn(D, generator=random).to(device, weight_dtype or dtype) for _ in range(2))
    angles = 6.3 * torch.rand(S, D // 2, generator=random).to(device, torch.promote_types(dtype, torch.float32))
    return q, k, *weights, angles.cos(), angles.sin(), EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(B=st.integers(1, 2), S=st.integers(1, 7), h=st.integers(1, 5), pairs=st.integers(1, 40))
@example(B=1, S=1, h=1, pairs=1)
@example(B=2, S=7, h=3, pairs=32)
@example(B=1, S=5, h=2, pairs=64)
@example(B=1, S=3, h=2, pairs=13)
@example(B=2, S=70, h=3, pairs=9)
def test_error_is_about_that_of_eager_pytorch(isa, device, dtype, B, S, h, pairs):
    arguments = inputs(B, S, h, 2 * pairs, dtype, device)
    assert_accurate(qk_norm_rope, qk_norm_rope_reference, arguments, DIFFERENTIABLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_may_have_another_dtype(isa, device, dtype):
    arguments = inputs(2, 3, 2, 16, dtype, device, weight_dtype=torch.float32)
    assert_accurate(qk_norm_rope, qk_norm_rope_reference, arguments, DIFFERENTIABLE)


def test_a_quarter_turn_swaps_each_pair(isa, device):
    q = torch.tensor([3.0, 4.0, 0.0, 5.0], device=device).view(1, 1, 1, 4)
    ones = torch.ones(4, device=device)
    cos, sin = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    rms = (50 / 4) ** 0.5
    expected = torch.tensor([-4.0, 3.0, -5.0, 0.0], device=device).view(1, 1, 1, 4) / rms
    q_out, k_out = qk_norm_rope(q, 2 * q, ones, 3 * ones, cos, sin, eps=0.0)
    assert_matches(q_out, expected)
    assert_matches(k_out, 3 * expected)


def test_no_rotation_is_rms_norm_per_head(isa, device):
    q, k, q_weight, k_weight, cos, sin, eps = inputs(2, 3, 4, 32, device=device)
    q_out, k_out = qk_norm_rope(q, k, q_weight, k_weight, torch.ones_like(cos), torch.zeros_like(sin), eps)
    assert_matches(q_out, torch.nn.functional.rms_norm(q, (32,), q_weight, eps))
    assert_matches(k_out, torch.nn.functional.rms_norm(k, (32,), k_weight, eps))


def test_the_default_eps_is_that_of_the_released_models(isa, device):
    released = Kandinsky5Attention(8, 8).query_norm.to(device)
    q, k, _, k_weight, cos, sin, _ = inputs(1, 3, 2, 8, device=device)
    q = 1e-4 * q  # so small that eps decides
    q_out, _ = qk_norm_rope(q, k, released.weight.detach(), k_weight, torch.ones_like(cos), torch.zeros_like(sin))
    assert_matches(q_out, released(q).detach())


def test_scores_depend_on_the_distance_of_two_tokens_only(isa, device):
    q, k, q_weight, k_weight, *_ = inputs(1, 1, 1, 8, device=device)
    angles = torch.arange(6.0, device=device)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.1], device=device)
    repeated = (tensor.expand(1, 6, 1, 8) for tensor in (q, k))
    q_out, k_out = qk_norm_rope(*repeated, q_weight, k_weight, angles.cos(), angles.sin())
    scores = q_out[0, :, 0] @ k_out[0, :, 0].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        assert_matches(diagonal, diagonal[:1].expand_as(diagonal).contiguous())


@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)])
def test_empty_sizes_give_empty_results_and_zero_gradients(isa, device, sizes):
    q_out, k_out, *grads = outputs_and_gradients(qk_norm_rope, inputs(*sizes, device=device), DIFFERENTIABLE)
    assert q_out.shape == k_out.shape == sizes
    for grad in grads:
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_into_a_fused_projection_give_the_same_bits(isa, device, dtype):
    q, k, *rest = inputs(2, 5, 3, 16, dtype, device)
    fused = torch.stack([q, k], dim=2)
    actual = qk_norm_rope(*fused.unbind(2), *rest)
    for one, other in zip(actual, qk_norm_rope(q, k, *rest), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_any_strides_give_the_same_result(isa, device):
    q, k, q_weight, k_weight, cos, sin, eps = inputs(2, 6, 4, 10, device=device)
    expected = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        torch.stack([q_weight, q_weight], dim=1)[:, 0],
        k_weight,
        cos.mT.contiguous().mT,
        torch.cat([sin, sin], dim=-1)[:, :5],
    )
    for one, other in zip(qk_norm_rope(*strided, eps), expected, strict=True):
        assert one.is_contiguous()
        assert_matches(one, other)


def test_gradients_are_the_derivatives():
    q, k, q_weight, k_weight, cos, sin, eps = inputs(2, 2, 2, 4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *tensors: qk_norm_rope(*tensors, cos, sin, eps),
        [tensor.requires_grad_() for tensor in (q, k, q_weight, k_weight)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes(device, dtype):
    q, k, q_weight, k_weight, cos, sin, eps = inputs(2, 3, 2, 12, dtype, device)
    differentiable = [tensor.clone().requires_grad_() for tensor in (q, k, q_weight, k_weight)]
    torch.library.opcheck(torch.ops.k5.qk_norm_rope, (*differentiable, cos, sin, eps))
    grads = (torch.randn_like(q), torch.randn_like(k))
    torch.library.opcheck(torch.ops.k5.qk_norm_rope_backward, (*grads, q, k, q_weight, k_weight, cos, sin, eps))


@pytest.mark.parametrize("place", ["q_weight", "cos", "sin"])
def test_a_nan_with_all_its_bits_set_stays_a_nan_in_bfloat16(isa, place):
    q, k, *tensors, eps = inputs(1, 3, 2, 14, torch.bfloat16, weight_dtype=torch.float32)
    named = dict(zip(("q_weight", "k_weight", "cos", "sin"), tensors, strict=True))
    named[place].view(-1)[1] = nan_with_all_bits_set()
    q_out, _, grad_q, *_ = outputs_and_gradients(qk_norm_rope, (q, k, *named.values(), eps), DIFFERENTIABLE)
    tokens, pair = (slice(None), slice(0, 2)) if place == "q_weight" else (slice(1), slice(2, 4))
    # The gradient of a head has a mean over it.
    for result, of_nan in ((q_out, (0, tokens, slice(None), pair)), (grad_q, (0, tokens))):
        assert result[of_nan].isnan().all()
        assert result.isnan().sum() == result[of_nan].numel()


def test_one_compiled_graph_serves_all_sizes(device):
    argument_sets = [inputs(*sizes, device=device) for sizes in ((2, 5, 3, 16), (3, 7, 4, 24))]
    assert_compiled_equals_eager(qk_norm_rope, argument_sets, DIFFERENTIABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_changes_no_bit(isa, set_threads, dtype):
    # Weights in float32, whose gradients show the order of a sum that bfloat16 would round away.
    arguments = inputs(2, 150, 3, 64, dtype, weight_dtype=torch.float32)
    assert_thread_count_changes_no_bit(
        lambda: outputs_and_gradients(qk_norm_rope, arguments, DIFFERENTIABLE), set_threads, (1, 2, 3)
    )


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(28, 64), (16, 112), (25, 72)])  # 64 at a time; and less left
def test_a_result_too_large_for_the_caches_has_the_bits_of_its_parts(isa, heads, width, dtype, output):
    q, k, q_weight, k_weight, cos, sin, eps = inputs(1, 2048, heads, width, dtype)
    rotation = [tensor[None] for tensor in (cos, sin)]  # [1, S, D/2], to be cut like q and k

    def rotated(q, k, cos, sin):
        return qk_norm_rope(q, k, q_weight, k_weight, cos[0], sin[0], eps)[output]

    def gradient(q, k, cos, sin):
        grads = (k, q)
        return torch.ops.k5.qk_norm_rope_backward(*grads, q, k, q_weight, k_weight, cos[0], sin[0], eps)[output]

    assert_equals_its_parts(rotated, (q, k, *rotation))
    assert_equals_its_parts(gradient, (q, k, *rotation))


def test_gradients_of_any_strides_give_the_same_result(isa, device):
    q, k, *rest = inputs(2, 6, 4, 16, device=device)
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (k, q)]
    widths_apart = [tensor.mT.contiguous().mT for tensor in (k, q)]
    expected = torch.ops.k5.qk_norm_rope_backward(k, q, q, k, *rest)
    for grads in (heads_first, widths_apart):
        assert not any(grad.is_contiguous() for grad in grads)
        for one, other in zip(torch.ops.k5.qk_norm_rope_backward(*grads, q, k, *rest), expected, strict=True):
            assert one.is_contiguous()
            assert_matches(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q: expected a floating \[B, S, h, D\] with an even D, got .*\[2, 3, 4\]"),
        ({"q": torch.zeros(2, 3, 4, 7)}, r"q: .*even D, got torch.float32 \[2, 3, 4, 7\]"),
        ({"k": torch.zeros(2, 3, 2, 8)}, r"k: expected torch.float32 \[2, 3, 4, 8\] like q, got .*\[2, 3, 2, 8\]"),
        ({"k": torch.zeros(2, 3, 4, 8).bfloat16()}, r"k: .*got torch.bfloat16"),
        ({"k_weight": torch.zeros(4, 8)}, r"k_weight: expected a floating \[8\], got torch.float32 \[4, 8\]"),
        ({"cos": torch.zeros(3, 8)}, r"cos: expected a floating \[3, 4\], got torch.float32 \[3, 8\]"),
        ({"sin": torch.zeros(3, 4, dtype=torch.int64)}, r"sin: .*got torch.int64"),
    ],
)
def test_bad_input_is_named(change, message):
    q, weight, angles = torch.zeros(2, 3, 4, 8), torch.zeros(8), torch.zeros(3, 4)
    good = {"q": q, "k": q, "q_weight": weight, "k_weight": weight, "cos": angles, "sin": angles}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**good, **change})
