"""What the processes of a training agree on: rank 0 does something for all, or all do it and share their errors.

Without a process group there is one process, rank 0, and nothing is sent.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


def rank() -> int:
    """Number of this process among those of the training."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first(function: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What the function returns on rank 0, where alone it runs; an error that it raises there is raised on all."""
    if count() == 1:
        return function()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = function()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0, group=group)
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in order of ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=group)
    return values


def everywhere(function: Callable[[], None], group: ProcessGroup | None = None) -> None:
    """Run the function on every rank; where it fails on any, the error of the first of them is raised on all.

    The function itself must not wait for other ranks.
    """
    failure: Exception | None = None
    try:
        function()
    except Exception as error:
        failure = error
    for raised in gathered(failure, group):
        if raised is not None:
            raise raised
