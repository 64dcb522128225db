"""Tensors that follow from hashable arguments are built once and shared."""

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Built = TypeVar("Built")


def cached_tensors(maxsize: int) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
    """Decorate a function that builds tensors: the last `maxsize` results are kept, and must not be written to.

    While a compiler traces, and in a dispatch mode such as FakeTensorMode, it builds anew: tensors made there stand
    for others and may not outlive it.
    """

    def decorate(build: Callable[..., Built]) -> Callable[..., Built]:
        @lru_cache(maxsize)
        def kept(*args: Hashable) -> Built:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a backward
                return build(*args)

        @wraps(build)
        def shared(*args: Hashable) -> Built:
            tracing = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
            return build(*args) if tracing else kept(*args)

        return shared

    return decorate
