"""A linear layer without gradients against PyTorch's own, whichever product the processor gives it."""

from copy import deepcopy

import pytest
import torch
from tolerances import assert_error_bounded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import gelu
from torch.profiler import ProfilerActivity, profile

from model import linear
from model.linear import ROWS_TO_REORDER, Linear

ONEDNN = "mkldnn::_linear_pointwise"
has_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN is taken on processors with AVX-512"
)


def operators(layer: Linear, x: torch.Tensor) -> set[str]:
    """The names of all operators that a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        layer(x)
    return {event.name for event in recorded.events()}


@pytest.mark.parametrize("gelu_too", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 33), (33,), (1, 33), (2, 7, 33), (ROWS_TO_REORDER + 1, 33), (2, ROWS_TO_REORDER, 48)]
)
@torch.no_grad()
def test_it_errs_no_more_than_pytorchs_own(shape, bias, gelu_too):
    layer, x = Linear(shape[-1], 50, bias), torch.randn(shape)
    wide = nn.functional.linear(x.double(), *(parameter.double() for parameter in layer.parameters()))
    eager = nn.functional.linear(x, *layer.parameters())
    if gelu_too:
        wide, eager = gelu(wide), gelu(eager)
    assert_error_bounded(layer(x, gelu=gelu_too), eager, wide)


@pytest.mark.parametrize("transpose", ["x", "weight"])
@torch.no_grad()
def test_rows_of_any_stride(transpose):
    layer, x = Linear(40, 40), torch.randn(40, 40)
    if transpose == "x":
        x = x.t()
    else:
        layer.weight.data = layer.weight.data.t()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@torch.no_grad()
def test_it_computes_with_the_weights_of_now():
    layer, x = Linear(24, 8), torch.randn(ROWS_TO_REORDER, 24)
    before = layer(x)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)


@has_avx512
@torch.no_grad()
def test_onednn_computes_it_where_no_gradient_is_asked_for():
    assert ONEDNN in operators(Linear(24, 8), torch.randn(3, 24))


@has_avx512
@torch.no_grad()
def test_a_pytorch_without_these_operators_computes_it_itself(monkeypatch):
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)
    assert ONEDNN not in operators(Linear(24, 8), torch.randn(3, 24))


@pytest.mark.parametrize("gelu_too", [False, True])
def test_gradients_are_those_of_a_plain_layer(gelu_too):
    layer, x = Linear(24, 8), torch.randn(3, 24, requires_grad=True)
    out = nn.functional.linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad((gelu(out) if gelu_too else out).square().sum(), [x, *layer.parameters()])
    actual = torch.autograd.grad(layer(x, gelu=gelu_too).square().sum(), [x, *layer.parameters()])
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_other_dtypes_autocast_and_tensors_without_memory_are_left_to_pytorch():
    layer, x = Linear(24, 8), torch.randn(ROWS_TO_REORDER, 24)
    for dtype in (torch.bfloat16, torch.float64):
        assert deepcopy(layer).to(dtype)(x.to(dtype), gelu=True).dtype == dtype
    with torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to("meta")(x.to("meta")).shape == (ROWS_TO_REORDER, 8)
    with FakeTensorMode():
        assert Linear(24, 8)(torch.randn(ROWS_TO_REORDER, 24)).shape == (ROWS_TO_REORDER, 8)
