"""RMSNorm and rotary embedding of q and k, and their gradients, by the Triton kernels against the definition."""

import pytest
import torch
from dense_attention import far_apart
from kernel_checks import assert_kernel_accurate

from k5kernels.ops.qk_norm_rope import EPS, qk_norm_rope_backward_reference, qk_norm_rope_reference
from k5kernels.triton import qk_norm_rope as kernels

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and runs so small that few tokens need several of each."""
    monkeypatch.setattr(kernels, "FORWARD_VALUES", 128)
    monkeypatch.setattr(kernels, "BACKWARD_VALUES", 128)


def inputs(B, S, h, D, dtype=FLOAT, weight_dtype=FLOAT):
    """grad_q, grad_k, q, k, q_weight, k_weight, cos, sin and eps."""
    random = torch.Generator().manual_seed(0)
    tokens = [torch.randn(B, S, h, D, generator=random).to(dtype) for _ in range(4)]
    weights = [torch.randn(D, generator=random).to(weight_dtype) for _ in range(2)]
    angles = 6.3 * torch.rand(S, D // 2, generator=random)
    return *tokens, *weights, angles.cos(), angles.sin(), EPS


def assert_accurate(arguments):
    assert_kernel_accurate(kernels.qk_norm_rope, qk_norm_rope_reference, arguments[2:])
    assert_kernel_accurate(kernels.qk_norm_rope_backward, qk_norm_rope_backward_reference, arguments)


def assert_same_bits(one, other):
    pairs = [
        *zip(kernels.qk_norm_rope(*one[2:]), kernels.qk_norm_rope(*other[2:]), strict=True),
        *zip(kernels.qk_norm_rope_backward(*one), kernels.qk_norm_rope_backward(*other), strict=True),
    ]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(FLOAT, FLOAT), (BF16, FLOAT), (BF16, BF16), (HALF, FLOAT)], ids=str
)
def test_several_tiles_and_runs_of_rows(small_tiles, dtype, weight_dtype):
    assert_accurate(inputs(2, 5, 3, 16, dtype, weight_dtype))


@pytest.mark.parametrize(("h", "D"), [(1, 2), (3, 26), (28, 64), (2, 128), (2, 1024)])
def test_any_head_dim(h, D):
    assert_accurate(inputs(1, 3, h, D))


def test_views_of_a_fused_projection_and_of_heads_before_tokens(small_tiles):
    grad_q, grad_k, q, k, *rest = arguments = inputs(2, 5, 3, 16, BF16)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad_q, grad_k))
    assert_same_bits((*heads_first, *torch.stack([q, k], dim=2).unbind(2), *rest), arguments)


def test_tensors_with_any_strides(small_tiles):
    grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, eps = arguments = inputs(1, 5, 2, 16)
    given = (
        *(x.mT.contiguous().mT for x in (grad_q, grad_k, q, k)),
        *(torch.stack([x, x], dim=1)[:, 0] for x in (q_weight, k_weight)),
        cos.mT.contiguous().mT,
        torch.cat([sin, sin], dim=-1)[:, :8],
    )
    assert not any(tensor.is_contiguous() for tensor in given)
    assert_same_bits((*given, eps), arguments)


def test_tokens_further_apart_than_32_bits_count_are_found():
    grad_q, grad_k, q, k, *rest = arguments = inputs(1, 70, 1, 8)
    far = (x.transpose(1, 2) for x in far_apart([x.transpose(1, 2) for x in (grad_q, grad_k, q, k)]))
    assert_same_bits((*far, *rest), arguments)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)])
def test_no_values(sizes):
    arguments = inputs(*sizes)
    assert [out.shape for out in kernels.qk_norm_rope(*arguments[2:])] == [sizes, sizes]
    gradients = kernels.qk_norm_rope_backward(*arguments)
    assert [grad.shape for grad in gradients] == [tensor.shape for tensor in arguments[2:6]]
    assert not any(grad.any() for grad in gradients)
