"""The gated residual and its gradients by the Triton kernels against the definition."""

import pytest
import torch
from kernel_checks import assert_kernel_accurate, spread
from modulations import PER, clip_starts_for, modulation_shape

from k5kernels.ops.gated_residual import gated_residual_backward_reference, gated_residual_reference
from k5kernels.triton import gated_residual as kernels
from k5kernels.triton import token_runs

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
CLIPS = [3, 10]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and runs so small that few tokens need several of each."""
    monkeypatch.setattr(kernels, "VALUES", 128)
    monkeypatch.setattr(kernels, "FORWARD_TILES", 2)
    monkeypatch.setattr(token_runs, "SUMMED_RUNS", 2)


def inputs(per, B, lengths, d, dtypes=(FLOAT, FLOAT, FLOAT)):
    """x, y, gate and clip_starts."""
    random = torch.Generator().manual_seed(0)
    shapes = [(B, sum(lengths), d)] * 2 + [modulation_shape(per, B, lengths, d)]
    tensors = [torch.randn(shape, generator=random).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return *tensors, clip_starts_for(per, lengths)


def assert_accurate(x, y, gate, starts):
    assert_kernel_accurate(kernels.gated_residual, gated_residual_reference, (x, y, gate, starts))
    backward = (x, y, gate, starts)  # any tensor like x is a gradient of the output
    assert_kernel_accurate(kernels.gated_residual_backward, gated_residual_backward_reference, backward)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtypes", [(BF16, BF16, FLOAT), (FLOAT, HALF, BF16)], ids=["bf16", "mixed"])
def test_several_tiles_and_runs_of_each_clip(small_tiles, per, dtypes):
    assert_accurate(*inputs(per, 2, CLIPS, 24, dtypes))


@pytest.mark.parametrize("d", [1, 100, 1792])
def test_any_width(monkeypatch, d):
    monkeypatch.setattr(token_runs, "SUMMED_COLUMNS", 64 if d < 1000 else 1024)
    assert_accurate(*inputs("clip", 1, [2, 5], d))


@pytest.mark.parametrize("per", ["clip", "token"])
def test_tensors_with_any_strides(small_tiles, per):
    x, y, gate, starts = inputs(per, 2, [2, 3], 24)
    given = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        y.mT.contiguous().mT,
        torch.cat([gate, gate], -1)[..., :24],
    )
    assert not any(tensor.is_contiguous() for tensor in given)
    assert torch.equal(kernels.gated_residual(*given, starts), kernels.gated_residual(x, y, gate, starts))
    gradients = kernels.gated_residual_backward(x, y, gate, starts)
    for actual, expected in zip(kernels.gated_residual_backward(*given, starts), gradients, strict=True):
        assert torch.equal(actual, expected)


def test_tokens_further_apart_than_32_bits_count_are_found(small_tiles):
    x, y, gate, starts = inputs("token", 1, [70], 8)
    far = (spread(x), spread(y), gate)
    assert torch.equal(kernels.gated_residual(*far, starts), kernels.gated_residual(x, y, gate, starts))
    gradients = kernels.gated_residual_backward(x, y, gate, starts)
    for actual, expected in zip(kernels.gated_residual_backward(*far, starts), gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("B", "lengths", "d"), [(0, [3, 1], 8), (2, [0], 8), (2, [3, 1], 0)])
def test_no_values(per, B, lengths, d):
    x, y, gate, starts = inputs(per if sum(lengths) else "sample", B, lengths, d)
    assert kernels.gated_residual(x, y, gate, starts).shape == x.shape
    grad_y, grad_gate = kernels.gated_residual_backward(x, y, gate, starts)
    assert (grad_y.shape, grad_gate.shape) == (y.shape, gate.shape)
    assert not grad_gate.any()
