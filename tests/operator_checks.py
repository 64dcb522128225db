"""Checks that every operator must pass, whatever it computes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerances import assert_error_bounded
from torch import Tensor

Function = Callable[..., Any]


def outputs_and_gradients(function: Function, arguments: Sequence[Any], wanted: Sequence[int]) -> list[Tensor]:
    """Outputs of `function`, then the gradients of the arguments numbered `wanted` for fixed random output gradients.

    The output gradients depend on the outputs' shapes only, and every dtype down to bfloat16 holds them exactly.
    """
    arguments = [
        value.detach().requires_grad_() if number in wanted else value for number, value in enumerate(arguments)
    ]
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(out.shape, generator=random).bfloat16().to(out) for out in outputs]
    inputs = [arguments[number] for number in wanted]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def nan_with_all_bits_set() -> Tensor:
    """A float32 NaN that becomes a number where its upper half is rounded to bfloat16 as a number's would be."""
    return torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


def assert_accurate(operator: Function, reference: Function, arguments: Sequence[Any], wanted: Sequence[int]) -> None:
    """Forward and backward of `operator` err about as little as autograd through plain PyTorch, against float64."""
    in_float64 = [value.double() if isinstance(value, Tensor) else value for value in arguments]
    actual = outputs_and_gradients(operator, arguments, wanted)
    eager = outputs_and_gradients(reference, arguments, wanted)
    exact = outputs_and_gradients(reference, in_float64, wanted)
    for one, other, truth in zip(actual, eager, exact, strict=True):
        assert_error_bounded(one, other, truth)


def assert_compiled_equals_eager(
    function: Function, argument_sets: Sequence[Sequence[Any]], wanted: Sequence[int]
) -> None:
    """One graph, dynamic in the sizes, serves all `argument_sets` and gives what eager gives, bit for bit."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for arguments in argument_sets:
            actual = outputs_and_gradients(compiled, arguments, wanted)
            expected = outputs_and_gradients(function, arguments, wanted)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
                assert one.stride() == other.stride()


def assert_thread_count_changes_no_bit(
    function: Function, set_threads: Callable[[int], None], thread_counts: Sequence[int] = (1, 2)
) -> None:
    """Two runs, and runs on each number of threads, give the same bits."""
    set_threads(thread_counts[0])
    expected = function()
    for threads in thread_counts:
        set_threads(threads)
        torch.testing.assert_close(function(), expected, rtol=0, atol=0)


def assert_equals_its_parts(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    """`function` of tensors [B, S, ...] gives the bits that it gives of each eighth of their tokens.

    Kernels write a result past the caches where it is large: here the whole, not its eighths.
    """
    whole = function(*tensors)
    eighths = zip(*(tensor.split(tensor.shape[1] // 8, dim=1) for tensor in tensors), strict=True)
    parts = [function(*eighth) for eighth in eighths]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), rtol=0, atol=0)
