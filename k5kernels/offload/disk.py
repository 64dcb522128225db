"""Tensors of the CPU in a file, written by a background thread and mapped into memory to come back."""

import mmap
import os
import tempfile
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.offload.slot import Form

WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE


class DiskStore:
    """Keeps tensors in one file of a folder. The file has no name, so that it goes with the process, however that ends.

    One thread writes, in the order it was asked to, so a place in the file may be given to the next tensor before the
    former one has been written. What comes back is a private mapping of its place: nothing is copied, and the system
    reads what its page cache no longer has. A disk that fails to read then ends the process by SIGBUS.

    budget_bytes: the most kept at a time. Raises OSError where no file can be made in the folder.
    """

    def __init__(self, folder: Path, budget_bytes: float) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as the store
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._failure: OSError | None = None
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
        return DiskSlot(self, Place(self, form, offset), self._worker.submit(self._write, tensor, form, offset))

    def check(self) -> None:
        """As `Store`."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let the thread end and the file go. No tensor can be taken afterwards."""
        self._worker.shutdown()
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

    def __init__(self, store: DiskStore, place: Place, written: "Future[None]") -> None:
        self._store, self._written = store, written
        self._place: Place | None = place

    def wait_sent(self) -> None:
        """As `Slot`."""
        wait([self._written])

    def bring_back(self) -> None:
        """As `Slot`."""
        assert self._place is not None
        self._store.read_ahead(self._place)

    def take(self) -> Tensor:
        """As `Slot`."""
        self.wait_sent()
        self._store.check()
        self._written.result()
        assert self._place is not None
        return self._store.mapped(self._place)

    def release(self) -> None:
        """As `Slot`."""
        self._place = None


def _length(form: Form) -> int:
    """Of a place for such a tensor: a mapping begins at a page."""
    return -(-form.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
