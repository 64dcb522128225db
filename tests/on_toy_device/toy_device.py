"""A device "toy" beside the CPU, so that moving tensors to a device can be tested on a machine without a GPU.

Its tensors hold their numbers in CPU memory and compute there, to the same bits, but PyTorch sees them on a device of
their own: an operator that gets tensors from both raises, as it does between a GPU and the CPU. A process that imports
this file keeps the device as its accelerator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CROSSING = (aten._to_copy.default, aten.copy_.default)  # what may read one device and write another


class ToyTensor(Tensor):
    """A tensor on the toy device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "ToyTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="toy:0",
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _compute(operator, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()  # Tensor's reads memory of the device itself

    def __reduce_ex__(self, protocol):
        """Saved as its numbers: loading gives a CPU tensor, as torch.load with map_location="cpu" does."""
        return self.held.detach().__reduce_ex__(protocol)


class _Dispatch(TorchDispatchMode):
    """Sees the operators that make tensors, too."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _compute(operator, args, kwargs or {})


def _compute(operator, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    toys = [tensor for tensor in tensors if isinstance(tensor, ToyTensor)]
    # As on a GPU, a CPU tensor without dimensions passes for a number.
    strangers = [tensor for tensor in tensors if not isinstance(tensor, ToyTensor) and tensor.ndim]
    if toys and strangers and operator not in CROSSING:
        raise RuntimeError(f"{operator}: expected all tensors on one device, got some on toy:0 and some on the CPU")
    device = kwargs.get("device")
    on_toy = bool(toys) if device is None else torch.device(device).type == "toy"
    if operator is aten.copy_.default:
        on_toy = isinstance(args[0], ToyTensor)
    if device is not None:
        kwargs = kwargs | {"device": "cpu"}
    out = operator(*tree_map(_held, args), **tree_map(_held, kwargs))
    owners = {id(toy.held): toy for toy in toys}  # an operator in place returns its argument
    return tree_map(lambda leaf: _wrapped(leaf, owners), out) if on_toy else out


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, ToyTensor) else leaf


def _wrapped(leaf: Any, owners: dict[int, ToyTensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return owners[id(leaf)] if id(leaf) in owners else ToyTensor(leaf)


def _tensor(data: Any, *, device: torch.device | str | None = None, make=torch.tensor, **settings: Any) -> Tensor:
    """torch.tensor fills memory of the device itself, past every dispatch."""
    return make(data, **settings).to(device)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


# PyTorch makes a queue a device at the first backward of the process: the device must be there by then.
backend_registration._setup_privateuseone_for_python_backend("toy", _Module())
_autocast = torch.library.Library("_", "IMPL")
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@contextmanager
def toy_device() -> Iterator[torch.device]:
    """The toy device, as long as the block lasts. Under autocast its operators stay in float32."""
    with patch("torch.tensor", _tensor), _Dispatch():
        yield torch.device("toy:0")
