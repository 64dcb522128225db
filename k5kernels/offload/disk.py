"""Tensors of the CPU in a file, written by a background thread and mapped into memory to come back."""

import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor

from k5kernels.offload.slot import Form

WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE


class DiskStore:
    """Keeps tensors in one file of a folder. The file has no name, so that it goes with the process, however that ends.

    One thread writes, in the order it was asked to, so a place in the file may be given to the next tensor before the
    former one has been written. Waking it takes processor and interpreter from the computation, so tensors are gathered
    until they are as many bytes as the largest so far. What comes back is a private mapping of its place: nothing is
    copied, and the system reads what its page cache no longer has. A disk that fails to read then ends the process by
    SIGBUS.

    budget_bytes: the most kept at a time. Raises OSError where no file can be made in the folder.
    """

    def __init__(self, folder: Path, budget_bytes: float) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as the store
        self._gathered: list[_Write] = []
        self._gathered_bytes = self._largest = 0
        self._batches: SimpleQueue[list[_Write]] = SimpleQueue()
        self._failures: list[OSError] = []
        arguments = self._batches, self._file, self._failures
        self._writer = Thread(target=_write_all, args=arguments, name="offload", daemon=True)
        self._writer.start()
        weakref.finalize(self, self._batches.put, [])
        self._used = self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # length -> offsets in the file

    def put(self, tensor: Tensor) -> "DiskSlot | None":
        """As `Store`."""
        form = Form.of(tensor)
        if self._used + form.nbytes > self.budget_bytes:
            return None
        self._used += form.nbytes
        if places := self._free[_length(form)]:
            offset = places.pop()
        else:
            offset, self._end = self._end, self._end + _length(form)
        if tensor.stride() != form.strides:
            tensor = tensor.contiguous()
        write = _Write(form.bytes_of(tensor).numpy().data, offset)
        self._gathered.append(write)
        self._gathered_bytes += form.nbytes
        self._largest = max(self._largest, form.nbytes)
        if self._gathered_bytes >= self._largest:
            self._write_gathered()
        return DiskSlot(self, Place(self, form, offset), write)

    def wait_written(self, write: "_Write") -> None:
        """Wait until it is done; with one that is still gathered, the others are begun too."""
        if write in self._gathered:
            self._write_gathered()
        with write.done:
            pass

    def check(self) -> None:
        """As `Store`."""
        if self._failures:
            error = self._failures[-1]
            self._failures.clear()
            raise self.failure(error) from error

    def failure(self, error: OSError) -> OSError:
        """What to raise for it."""
        words = f"cannot keep activations for the backward: {error.strerror}"
        return OSError(error.errno, words, str(self.folder))

    def close(self) -> None:
        """Let the thread end and the file go. No tensor can be taken afterwards."""
        self._write_gathered()
        self._batches.put([])
        self._writer.join()
        self._file.close()

    def mapped(self, place: "Place") -> Tensor:
        """What was written there. Memory that is written to is its user's alone; the file stays as it is."""
        mapping = _Mapping(
            self._file.fileno(), place.form.nbytes, flags=mmap.MAP_PRIVATE, prot=WRITABLE, offset=place.offset
        )
        mapping.place = place
        return place.form.within(torch.frombuffer(mapping, dtype=torch.uint8))

    def read_ahead(self, place: "Place") -> None:
        """Let the system begin to read what its page cache does not have."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file.fileno(), place.offset, place.form.nbytes, os.POSIX_FADV_WILLNEED)

    def give_back(self, form: Form, offset: int) -> None:
        """The place is free."""
        self._used -= form.nbytes
        self._free[_length(form)].append(offset)
        if not self._used:  # between two steps: the next one may have tensors of other sizes
            self._free.clear()
            self._end = 0

    def _write_gathered(self) -> None:
        batch, self._gathered, self._gathered_bytes = self._gathered, [], 0
        self._batches.put(batch)


class _Write:
    """Bytes for a place in the file. done: held until they are there, or failed with error."""

    def __init__(self, data: memoryview, offset: int) -> None:
        self.error: OSError | None = None
        self.done = Lock()
        self.done.acquire()
        self._data: memoryview | None = data
        self._offset = offset

    def run(self, file: int, failures: list[OSError]) -> None:
        """Write them and let them go; add to the failures where that fails."""
        left, self._data, offset = self._data, None, self._offset
        try:
            while left:
                written = os.pwrite(file, left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            self.error = error
            failures.append(error)
        del left  # before those who wait free the tensor
        self.done.release()

    def call_off(self) -> None:
        """Let them go; unless they are being written, they will not be."""
        self._data = None


def _write_all(batches: "SimpleQueue[list[_Write]]", file: FileIO, failures: list[OSError]) -> None:
    """What the thread does until an empty batch comes. It has the file open, whatever becomes of the store."""
    while batch := batches.get():
        for write in batch:
            write.run(file.fileno(), failures)


class Place:
    """A part of a store's file, which gets it back when neither a slot nor a mapping has it any more."""

    def __init__(self, store: DiskStore, form: Form, offset: int) -> None:
        self.form, self.offset = form, offset
        self._store = store

    def __del__(self) -> None:
        self._store.give_back(self.form, self.offset)


class _Mapping(mmap.mmap):
    """place: the mapped one, which is taken for as long as a tensor has this memory."""

    place: Place


class DiskSlot:
    """A tensor in the file of a DiskStore."""

    def __init__(self, store: DiskStore, place: Place, write: _Write) -> None:
        self._store, self._write = store, write
        self._place: Place | None = place

    def wait_sent(self) -> None:
        """As `Slot`."""
        self._store.wait_written(self._write)

    def bring_back(self) -> None:
        """As `Slot`."""
        assert self._place is not None
        self._store.read_ahead(self._place)

    def take(self) -> Tensor:
        """As `Slot`."""
        self.wait_sent()
        self._store.check()
        if (error := self._write.error) is not None:
            raise self._store.failure(error) from error
        assert self._place is not None
        return self._store.mapped(self._place)

    def release(self) -> None:
        """As `Slot`."""
        self._write.call_off()
        self._place = None


def _length(form: Form) -> int:
    """Of a place for such a tensor: a mapping begins at a page."""
    return -(-form.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
