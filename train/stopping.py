"""A training that is asked to stop by SIGTERM or Ctrl-C does so between two steps, when it has saved."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from k5kernels.terminal import Stopped

# torchrun passes on to its processes what a terminal or a scheduler has sent to them already: that is one request.
SAME_REQUEST_SECONDS = 3.0


class StopRequest:
    """number: of the signal that asked, 0 while none has."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def note(self, number: int, frame: object) -> None:
        """The first signal is only noted. One that comes later, as from somebody who will not wait, raises Stopped."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            raise Stopped(number)


@contextmanager
def noting_stops() -> Iterator[StopRequest]:
    """In the block, SIGTERM and Ctrl-C are noted in what it is given. A thread that is not the main one gets none."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
