"""What autograd saves in the forward, kept away from its device until shortly before the backward asks for it
(§6.1, §6.6)."""

import math
import weakref
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from k5kernels.offload.disk import DiskStore
from k5kernels.offload.pinned import PinnedStore, SideStream
from k5kernels.offload.slot import Slot, Store, is_dense

SMALLEST = 1 << 20
BEING_SENT = 2  # times the largest tensor; with the tensor that is being computed, three are in memory


class ActivationOffload:
    """Context manager: what autograd saves inside leaves its device, and is back before the backward needs it.

        offload = ActivationOffload(folder="/scratch")
        for batch in batches:
            with offload:
                for block in blocks:
                    x = checkpoint(block, x, use_reentrant=False)
            loss(x).backward()

    Around checkpointed blocks only their positional arguments are saved, so only block inputs move: pass as arguments
    what differs from block to block and close over what all blocks share. Without checkpointing all that the blocks
    save moves. Gradients are bit-equal with and without.

    A CUDA tensor goes to pinned host memory, and back, on a stream beside the computation. A CPU tensor goes to a file
    in `folder`, by a thread beside the computation; the file has no name and goes with the process. In the forward at
    most twice the bytes of the largest tensor so far are on their way: the next one waits. In the backward, whoever
    asks for a tensor starts the return of the `prefetch` saved before it. So with one saved tensor of the same size a
    block and a prefetch of 1, at most three are in memory at a time.

    Left where they are: CPU tensors without a folder; parameters and other leaves that need a gradient, and views of
    them, which their owner keeps alive anyway; tensors under min_bytes; what would go beyond budget_bytes, the most
    that is away at a time. As without the context, a tensor must not be changed in place once it is saved.

    stores: where the tensors of each device go; a store of another kind can be put there.

    The backward raises OSError, which names the folder, where a tensor could not be written. Raises ValueError where a
    number is out of range, OSError where there can be no file in the folder.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        budget_bytes: float = math.inf,
        prefetch: int = 1,
        min_bytes: int = SMALLEST,
    ) -> None:
        if not budget_bytes >= 0:
            raise ValueError(f"budget_bytes: expected at least 0, got {budget_bytes}")
        if prefetch < 0:
            raise ValueError(f"prefetch: expected at least 0, got {prefetch}")
        self._budget_bytes, self._prefetch, self._min_bytes = budget_bytes, prefetch, min_bytes
        self.stores: dict[torch.device, Store] = {}
        if folder is not None:
            self.stores[torch.device("cpu")] = DiskStore(Path(folder), budget_bytes)
        self._sending: deque[tuple[weakref.ref[_Away], int]] = deque()
        self._sending_bytes = self._largest = 0
        self._last: weakref.ref[_Away] | None = None
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> "ActivationOffload":
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.pop().__exit__(kind, error, trace)
        self._known.clear()

    def close(self) -> None:
        """Let thread, file and host memory go; nothing that is away can come back."""
        for store in self.stores.values():
            store.close()
        self.stores.clear()

    def _pack(self, tensor: Tensor) -> "Tensor | _Away | _View":
        if not _is_offloadable(tensor, self._min_bytes) or (store := self._store(tensor.device)) is None:
            return tensor
        # Several operators save the same memory. A weak reference keeps the address of a storage from being used again.
        storage = StorageWeakRef(tensor.untyped_storage())
        key = storage.cdata, tensor.storage_offset(), tensor.nbytes, tensor.dtype, tensor._version
        if key in self._known and (away := self._known[key][1]()) is not None and not self._known[key][0].expired():
            if away.layout == (layout := (tensor.shape, tensor.stride())):
                return away
            if is_dense(*layout) and is_dense(*away.layout):
                return _View(away, *layout)
        # An operator that saves its own output would own itself through the graph of that output.
        tensor = tensor.detach()
        slot = store.put(tensor)
        if slot is None:
            return tensor
        away = _Away(store, slot, tensor, self._last)
        self._last = weakref.ref(away)
        self._known[key] = storage, self._last
        self._send(self._last, tensor.nbytes)
        return away

    def _send(self, away: "weakref.ref[_Away]", nbytes: int) -> None:
        """It is on its way; where those on their way are too many bytes, wait for the first ones."""
        self._sending.append((away, nbytes))
        self._sending_bytes += nbytes
        self._largest = max(self._largest, nbytes)
        while self._sending_bytes > BEING_SENT * self._largest:
            oldest, nbytes = self._sending.popleft()
            self._sending_bytes -= nbytes
            if (sent := oldest()) is not None:
                sent.leave()

    def _unpack(self, saved: "Tensor | _Away | _View") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if isinstance(saved, _View):
            return self._unpack(saved.of).as_strided(saved.shape, saved.strides)
        saved.store.check()
        tensor = saved.take()
        before: _Away | None = saved
        for _ in range(self._prefetch):
            before = None if before is None or before.before is None else before.before()
            if before is not None:
                before.bring_back()
        return tensor

    def _store(self, device: torch.device) -> Store | None:
        if device not in self.stores and device.type == "cuda":
            self.stores[device] = PinnedStore(device, self._budget_bytes, SideStream(device))
        return self.stores.get(device)


class _Away:
    """A saved tensor that is kept away; the graph owns it.

    near: the tensor as it was saved, as long as it is still here. before: the one that was saved before it. layout: the
    saved one's shape and strides.
    """

    def __init__(self, store: Store, slot: Slot, near: Tensor, before: "weakref.ref[_Away] | None") -> None:
        self.store, self.before = store, before
        self.layout = near.shape, near.stride()
        self._slot = slot
        self._near: Tensor | None = near

    def leave(self) -> None:
        """Free the tensor, once it is sent."""
        if self._near is not None:
            self._slot.wait_sent()
            self._near = None

    def bring_back(self) -> None:
        """Begin to, where it is not here."""
        if self._near is None:
            self._slot.bring_back()

    def take(self) -> Tensor:
        """The tensor."""
        return self._slot.take() if self._near is None else self._near

    def __del__(self) -> None:
        self._slot.release()


class _View(NamedTuple):
    """The memory of a tensor that is kept away, in another shape."""

    of: _Away
    shape: torch.Size
    strides: tuple[int, ...]


def _is_offloadable(tensor: Tensor, min_bytes: int) -> bool:
    if tensor.nbytes < max(min_bytes, 1):
        return False
    owner = tensor if tensor._base is None else tensor._base
    return not (isinstance(owner, nn.Parameter) or (owner.is_leaf and owner.requires_grad))
