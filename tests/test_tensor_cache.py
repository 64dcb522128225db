"""Tensors that are built once: shared, bounded in number, and never those of a tracer."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from k5kernels.tensor_cache import cached_tensors


@pytest.fixture
def build():
    """A cached function that notes its calls, and keeps two results."""

    @cached_tensors(maxsize=2)
    def ramp(length: int) -> torch.Tensor:
        """Zero, one and so on."""
        calls.append(length)
        return torch.arange(float(length))

    calls: list[int] = []
    ramp.calls = calls
    return ramp


def test_equal_arguments_give_the_same_tensor(build):
    assert build(3) is build(3)
    assert build.calls == [3]
    assert torch.equal(build(4), torch.arange(4.0))


def test_only_the_last_results_are_kept(build):
    for length in (1, 2, 3, 3, 1):
        build(length)
    assert build.calls == [1, 2, 3, 1]


def test_a_fake_tensor_neither_enters_the_cache_nor_leaves_it(build):
    with FakeTensorMode():
        assert isinstance(build(3), FakeTensor)
    real = build(3)
    assert not isinstance(real, FakeTensor)
    with FakeTensorMode():
        assert isinstance(build(3), FakeTensor)
    assert build(3) is real


def test_a_compiled_function_builds_its_own(build):
    kept = build(3)
    compiled = torch.compile(lambda x: x + build(x.shape[0]), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3) + kept)
    assert build(3) is kept


def test_a_tensor_first_built_for_inference_serves_training(build):
    with torch.inference_mode():
        build(3)
    weight = torch.ones(3, requires_grad=True)
    (weight * build(3)).sum().backward()
    assert torch.equal(weight.grad, build(3))


def test_the_function_keeps_its_name_and_its_documentation(build):
    assert build.__name__ == "ramp"
    assert build.__doc__ == "Zero, one and so on."
