"""Tensors of the CPU in a file, written and read by a background thread."""

import os
import tempfile
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.offload.slot import Form

CPU = torch.device("cpu")


class DiskStore:
    """Keeps tensors in one file of a folder. The file has no name, so that it goes with the process, however that ends.

    One thread writes and reads in the order it was asked to, so a place in the file may be given to the next tensor
    before the former one has been written.

    budget_bytes: the most kept at a time. Raises OSError where no file can be made in the folder.
    """

    def __init__(self, folder: Path, budget_bytes: float) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as the store
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._failure: OSError | None = None
        self._used = self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # bytes -> offsets in the file

    def put(self, tensor: Tensor) -> "DiskSlot | None":
        """As `Store`."""
        form = Form.of(tensor)
        if self._used + form.nbytes > self.budget_bytes:
            return None
        self._used += form.nbytes
        if places := self._free[form.nbytes]:
            offset = places.pop()
        else:
            offset, self._end = self._end, self._end + form.nbytes
        return DiskSlot(self, form, offset, self._worker.submit(self._write, tensor, form, offset))

    def check(self) -> None:
        """As `Store`."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let the thread end and the file go. No tensor can be taken afterwards."""
        self._worker.shutdown()
        self._file.close()

    def read(self, form: Form, offset: int) -> "Future[Tensor]":
        """The tensor that was written there, once the thread comes to it."""
        return self._worker.submit(self._read, form, offset)

    def give_back(self, form: Form, offset: int) -> None:
        """The place is free."""
        self._used -= form.nbytes
        self._free[form.nbytes].append(offset)
        if not self._used:  # between two steps: the next one may have tensors of other sizes
            self._free.clear()
            self._end = 0

    def _write(self, tensor: Tensor, form: Form, offset: int) -> None:
        try:
            if tensor.stride() != form.strides:
                tensor = tensor.contiguous()
            left = form.bytes_of(tensor).numpy().data
            while left:
                written = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            words = f"cannot keep activations for the backward: {error.strerror}"
            self._failure = OSError(error.errno, words, str(self.folder))
            raise self._failure from error

    def _read(self, form: Form, offset: int) -> Tensor:
        tensor = form.empty(CPU)
        left = form.bytes_of(tensor).numpy().data
        while left:
            count = os.preadv(self._file.fileno(), [left], offset)
            if count == 0:
                raise OSError(f"{self.folder}: the file of offloaded activations ends before one of them")
            left, offset = left[count:], offset + count
        return tensor


class DiskSlot:
    """A place in the file of a DiskStore."""

    def __init__(self, store: DiskStore, form: Form, offset: int, written: "Future[None]") -> None:
        self._store, self._form, self._offset, self._written = store, form, offset, written
        self._read: Future[Tensor] | None = None

    def wait_sent(self) -> None:
        """As `Slot`."""
        wait([self._written])

    def bring_back(self) -> None:
        """As `Slot`."""
        if self._read is None:
            self._read = self._store.read(self._form, self._offset)

    def take(self) -> Tensor:
        """As `Slot`."""
        self.wait_sent()
        self._store.check()
        self._written.result()
        self.bring_back()
        assert self._read is not None
        tensor, self._read = self._read.result(), None
        return tensor

    def release(self) -> None:
        """As `Slot`."""
        self._read = None
        self._store.give_back(self._form, self._offset)
