"""What the processes of a group agree on: its first does something for all, or all do it and share their errors.

group: of all processes that call together; None where there is one alone, and nothing is sent.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


def on_first(function: Callable[[], T], group: ProcessGroup | None) -> T:
    """What the function returns on rank 0, where alone it runs; an error that it raises there is raised on all."""
    if group is None:
        return function()
    told: list[Any] = [None, None]
    if group.rank() == 0:
        try:
            told[0] = function()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, group_src=0, group=group)
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(value: T, group: ProcessGroup | None) -> list[T]:
    """Every rank's value, in order of ranks."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def everywhere(function: Callable[[], None], group: ProcessGroup | None) -> None:
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
