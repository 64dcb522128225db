"""LayerNorm with modulation and its gradients by the Triton kernels against the definition."""

import pytest
import torch
from kernel_checks import assert_kernel_accurate, results, spread
from modulations import PER, clip_starts_for, modulation_shape

from k5kernels.ops.layernorm_modulate import (
    EPS,
    layernorm_modulate_backward_reference,
    layernorm_modulate_reference,
)
from k5kernels.triton import layernorm_modulate as kernels
from k5kernels.triton import token_runs

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
CLIPS = [3, 10]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and runs so small that few tokens need several of each."""
    monkeypatch.setattr(kernels, "FORWARD_VALUES", 128)
    monkeypatch.setattr(kernels, "BACKWARD_VALUES", 128)
    monkeypatch.setattr(kernels, "FORWARD_TILES", 2)
    monkeypatch.setattr(token_runs, "SUMMED_RUNS", 2)


def inputs(shift_per, scale_per, B, lengths, d, dtypes=(FLOAT, FLOAT, FLOAT)):
    """x, shift, scale, eps and clip_starts; no modulation is per sample where the other one is per clip."""
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(B, sum(lengths), d, generator=random) + 1
    rows = (torch.randn(modulation_shape(per, B, lengths, d), generator=random) for per in (shift_per, scale_per))
    tensors = [tensor.to(dtype) for tensor, dtype in zip((x, *rows), dtypes, strict=True)]
    return *tensors, EPS, clip_starts_for("clip" if "clip" in (shift_per, scale_per) else "token", lengths)


def backward_arguments(x, shift, scale, eps, starts):
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return grad, x, scale, eps, shift.shape, starts


def assert_accurate(*arguments):
    assert_kernel_accurate(kernels.layernorm_modulate, layernorm_modulate_reference, arguments)
    assert_kernel_accurate(
        kernels.layernorm_modulate_backward, layernorm_modulate_backward_reference, backward_arguments(*arguments)
    )


def assert_same_bits(arguments, others):
    """Of the outputs and the gradients, for arguments of the same values."""
    pairs = zip(backward_arguments(*arguments), backward_arguments(*others), strict=True)
    for launcher, one, other in (
        (kernels.layernorm_modulate, arguments, others),
        (kernels.layernorm_modulate_backward, *zip(*pairs, strict=True)),
    ):
        for actual, expected in zip(results(launcher(*one)), results(launcher(*other)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (HALF, FLOAT, BF16)], ids=["bf16", "mixed"])
def test_several_tiles_and_runs_of_each_clip(small_tiles, per, dtypes):
    assert_accurate(*inputs(per, per, 2 if per == "clip" else 1, CLIPS, 24, dtypes))


@pytest.mark.parametrize("per", [("clip", "token"), ("token", "clip")])
def test_one_modulation_may_have_a_row_a_token_and_the_other_not(small_tiles, per):
    assert_accurate(*inputs(*per, 1, CLIPS, 24))


@pytest.mark.parametrize("d", [1, 100, 1792])
def test_any_width(monkeypatch, d):
    monkeypatch.setattr(token_runs, "SUMMED_COLUMNS", 64 if d < 1000 else 1024)
    assert_accurate(*inputs("clip", "clip", 1, [2, 5], d))


def test_a_large_mean_costs_no_precision():
    x, *rest = inputs("sample", "sample", 1, [5], 256)
    assert_accurate(x + 1e4, *rest)


@pytest.mark.parametrize("per", ["clip", "token"])
def test_tensors_with_any_strides(small_tiles, per):
    x, shift, scale, *rest = inputs(per, per, 2, [2, 3], 24)
    given = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([shift, shift], -1)[..., :24],
        scale.mT.contiguous().mT,
    )
    assert not any(tensor.is_contiguous() for tensor in given)
    assert_same_bits((*given, *rest), (x, shift, scale, *rest))


def test_tokens_further_apart_than_32_bits_count_are_found(small_tiles):
    x, *rest = inputs("token", "token", 1, [70], 8)
    assert_same_bits((spread(x), *rest), (x, *rest))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("B", "lengths", "d"), [(0, [3, 1], 8), (2, [0], 8), (2, [3, 1], 0)])
def test_no_values(per, B, lengths, d):
    per = per if sum(lengths) else "sample"
    arguments = inputs(per, per, B, lengths, d)
    assert kernels.layernorm_modulate(*arguments).shape == arguments[0].shape
    gradients = kernels.layernorm_modulate_backward(*backward_arguments(*arguments))
    assert [grad.shape for grad in gradients] == [tensor.shape for tensor in arguments[:3]]
    assert not any(grad.any() for grad in gradients)
