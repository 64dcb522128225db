"""Tensors of a GPU in pinned host memory, copied on a stream beside the one that computes."""

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor

from k5kernels.offload.slot import Form


class Copies(Protocol):
    """Copies that run beside the computation of one device; a test has its own."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Host memory, uint8 [nbytes], that a copy can run to and from."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Begin a copy after all that has been computed and copied so far; both tensors must live until it was waited
        for. Returns what `wait` takes."""

    def wait(self, copied: Any) -> None:
        """What is computed from now on runs after that copy."""


class SideStream:
    """Copies on a CUDA stream of their own. No call waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def host_buffer(self, nbytes: int) -> Tensor:
        """As `Copies`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """As `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        """As `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(copied)


class PinnedStore:
    """Keeps tensors of one device in a pool of host buffers, which it uses again for tensors of as many bytes.

    Every tensor is made and freed on the stream that computes, which has waited for the tensor's copy by then: the
    allocator needs no `record_stream`, and the memory of an offloaded tensor is free as soon as its owner lets it go.

    budget_bytes: the most kept at a time.
    """

    def __init__(self, device: torch.device, budget_bytes: float, copies: Copies) -> None:
        self.device, self.budget_bytes, self.copies = device, budget_bytes, copies
        self._used = 0
        self._pool: dict[int, list[Tensor]] = defaultdict(list)

    def put(self, tensor: Tensor) -> "PinnedSlot | None":
        """As `Store`."""
        form = Form.of(tensor)
        if self._used + form.nbytes > self.budget_bytes:
            return None
        self._used += form.nbytes
        free = self._pool[form.nbytes]
        buffer = free.pop() if free else self.copies.host_buffer(form.nbytes)
        return PinnedSlot(self, form, buffer, self.copies.copy(form.within(buffer), tensor))

    def check(self) -> None:
        """As `Store`: a copy between memories reports no failure of its own."""

    def close(self) -> None:
        """Let the pool go."""
        self._pool.clear()

    def give_back(self, buffer: Tensor) -> None:
        """The buffer is free. Copies run in turn, so the next one to it cannot overtake the last one from it."""
        self._used -= buffer.nbytes
        self._pool[buffer.nbytes].append(buffer)


class PinnedSlot:
    """A host buffer of a PinnedStore."""

    def __init__(self, store: PinnedStore, form: Form, buffer: Tensor, sent: Any) -> None:
        self._store, self._form, self._buffer, self._sent = store, form, buffer, sent
        self._coming: tuple[Tensor, Any] | None = None

    def wait_sent(self) -> None:
        """As `Slot`."""
        self._store.copies.wait(self._sent)

    def bring_back(self) -> None:
        """As `Slot`."""
        if self._coming is None:
            tensor = self._form.empty(self._store.device)
            self._coming = tensor, self._store.copies.copy(tensor, self._form.within(self._buffer))

    def take(self) -> Tensor:
        """As `Slot`."""
        self.bring_back()
        assert self._coming is not None
        (tensor, copied), self._coming = self._coming, None
        self._store.copies.wait(copied)
        return tensor

    def release(self) -> None:
        """As `Slot`."""
        self.wait_sent()
        if self._coming is not None:  # it was brought back, and nobody took it
            self._store.copies.wait(self._coming[1])
            self._coming = None
        self._store.give_back(self._buffer)
