"""Iterators that run in threads, the next few at once, so that what they make is there when it is wanted.

Whatever the threads do, items are taken in the order of the iterators and of what each of them makes.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
FEWEST, MOST = 2, 8


def threads_beside(device: torch.device) -> int:
    """How many threads read beside an encoder on this device: few where they take its own cores."""
    return FEWEST if device.type == "cpu" else max(FEWEST, min(MOST, len(os.sched_getaffinity(0)) // 2))


class Ahead(Generic[T]):
    """Use as a context: at its end no thread runs any more, and the iterators are closed.

    seconds: how long the iterators have worked, in all threads together.
    """

    def __init__(self, threads: int, most: int, size: Callable[[T], int]) -> None:
        """threads: how many iterators run at once. most: of each, so much may wait to be taken, by `size`; an item that
        is larger waits alone.
        """
        self._threads, self._most, self._size = threads, most, size
        # What the threads compute is small, and the cores are the encoder's: as torch's DataLoader does for its own.
        self._pool = ThreadPoolExecutor(threads, "ahead", initializer=lambda: torch.set_num_threads(1))
        self._running: deque[Stream[T]] = deque()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds + sum(stream.seconds for stream in self._running)

    def run(self, iterators: Iterable[Callable[[], Iterator[T]]]) -> Iterator["Stream[T]"]:
        """What each of them makes, in turn. They are called in a thread. One that is not taken to its end is closed
        when the next one is asked for.
        """
        waiting = iter(iterators)
        while True:
            while len(self._running) < self._threads and (make := next(waiting, None)) is not None:
                stream = Stream(make, self._most, self._size)
                self._running.append(stream)
                self._pool.submit(stream.make_all)
            if not self._running:
                return
            yield self._running[0]
            done = self._running.popleft()
            done.close()
            self._seconds += done.seconds

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._running:
            stream.close()
        self._pool.shutdown(cancel_futures=True)


class Stream(Generic[T]):
    """What one iterator makes. seconds: how long it has worked."""

    def __init__(self, make: Callable[[], Iterator[T]], most: int, size: Callable[[T], int]) -> None:
        self._make, self._most, self._size = make, most, size
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._held = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self.seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        """In the thread that takes them. What the iterator raises is raised after the items before it."""
        while True:
            with self._changed:
                while not (self._items or self._ended):
                    self._changed.wait()
                if not self._items:
                    break
                item = self._items.popleft()
                self._held -= self._size(item)
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def make_all(self) -> None:
        """In the thread that makes them."""
        try:
            items = self._make()
            while not self._closed:
                began = time.perf_counter()
                try:
                    item = next(items)
                except StopIteration:
                    break
                finally:
                    self.seconds += time.perf_counter() - began
                self._put(item)
            if isinstance(items, Generator):
                items.close()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T) -> None:
        size = self._size(item)
        with self._changed:
            while self._items and self._held + size > self._most and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._items.append(item)
                self._held += size
                self._changed.notify_all()
