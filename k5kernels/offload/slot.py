"""A tensor's place away from its device, as `activations` uses it; `pinned` and `disk` each have one."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """What a tensor is beside its numbers: shape, strides in elements, dtype, bytes."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """The form of a copy of the tensor: its strides where it has no gaps and no overlaps, contiguous otherwise."""
        strides = tensor.stride() if is_dense(tensor.shape, tensor.stride()) else _contiguous(tensor.shape)
        return cls(tensor.shape, strides, tensor.dtype, tensor.nbytes)

    def empty(self, device: torch.device) -> Tensor:
        """A new tensor of this form."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def within(self, buffer: Tensor) -> Tensor:
        """The tensor of this form whose bytes are those of the buffer, uint8 [nbytes]."""
        return buffer.view(self.dtype).as_strided(self.shape, self.strides)

    def bytes_of(self, tensor: Tensor) -> Tensor:
        """The bytes of a tensor of this form, uint8 [nbytes], in its own memory."""
        return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class Slot(Protocol):
    """Where one tensor is kept, from the moment it was given to a store."""

    def wait_sent(self) -> None:
        """After this the tensor that was given may be freed. Does not raise: what failed, `take` tells."""

    def bring_back(self) -> None:
        """Begin to bring the tensor back, beside what runs. Twice is once."""

    def take(self) -> Tensor:
        """The tensor, on its device; it may be taken again. Raises OSError where it could not be kept."""

    def release(self) -> None:
        """Give the place to another tensor: nobody asks for this one any more."""


class Store(Protocol):
    """Keeps tensors of one device."""

    def put(self, tensor: Tensor) -> Slot | None:
        """Begin to copy a tensor, beside what runs; it must stay as it is until `wait_sent`. None where the budget is
        spent."""

    def check(self) -> None:
        """Raise OSError where a copy has failed since the last check."""

    def close(self) -> None:
        """Let all memory, files and threads go."""


def is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the elements fill their part of the memory, each once."""
    filled = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
