"""Iterators that run in threads: their items come in order, few wait, and nothing is left running."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from k5kernels.latents.ahead import Ahead, threads_beside


def size(item: int) -> int:
    return 1


def test_items_come_in_order_whichever_thread_is_first() -> None:
    def slow_first(number: int) -> Iterator[int]:
        for item in range(3):
            time.sleep(0.01 / (1 + number))
            yield 10 * number + item

    with Ahead[int](3, 10, size) as ahead:
        found = [list(stream) for stream in ahead.run(partial(slow_first, number) for number in range(5))]
    assert found == [[10 * number + item for item in range(3)] for number in range(5)]
    assert ahead.seconds > 3 * 0.01


def test_the_next_ones_are_made_while_one_is_taken_and_no_more_than_may_wait() -> None:
    made: list[int] = []

    def count(number: int) -> Iterator[int]:
        for item in range(100):
            made.append(number)
            yield item

    with Ahead[int](2, 4, size) as ahead:
        stream = iter(next(ahead.run(partial(count, number) for number in range(3))))
        next(stream)
        until(lambda: made.count(1) == 5)
        time.sleep(0.02)
    # Four wait, one is made and not in the queue yet; of the first one more, which was taken.
    assert (made.count(0), made.count(1), made.count(2)) == (6, 5, 0)


def test_a_large_item_waits_alone() -> None:
    made: list[int] = []

    def large() -> Iterator[int]:
        for item in (100, 100, 100):
            made.append(item)
            yield item

    with Ahead[int](1, 4, lambda item: item) as ahead:
        stream = next(ahead.run([large]))
        until(lambda: len(made) == 2)
        time.sleep(0.02)
        assert len(made) == 2
        assert list(stream) == [100, 100, 100]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise error

    with Ahead[int](2, 4, size) as ahead:
        items = iter(next(ahead.run([failing, failing])))
        assert next(items) == 1
        with pytest.raises(type(error)):
            next(items)


def test_at_the_end_iterators_are_closed_and_no_thread_runs() -> None:
    begun: list[int] = []
    closed: list[int] = []

    def endless(number: int) -> Iterator[int]:
        begun.append(number)
        try:
            while True:
                yield number
        finally:
            closed.append(number)

    before = threading.active_count()
    with Ahead[int](2, 4, size) as ahead:
        streams = ahead.run(partial(endless, number) for number in range(9))
        assert next(iter(next(streams))) == 0
        assert next(iter(next(streams))) == 1
    assert sorted(closed) == sorted(begun)
    assert {0, 1} <= set(closed) <= {0, 1, 2}
    assert threading.active_count() == before


def test_the_callers_threads_stay_the_encoders(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    seen = []

    def look() -> Iterator[int]:
        seen.append(torch.get_num_threads())
        yield 0

    with Ahead[int](2, 4, size) as ahead:
        for stream in ahead.run([look, look]):
            list(stream)
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("device", "cores", "threads"), [("cpu", 64, 2), ("cuda", 2, 2), ("cuda", 12, 6), ("cuda", 64, 8)]
)
def test_more_threads_read_where_the_cores_are_not_the_encoders(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert threads_beside(torch.device(device)) == threads
