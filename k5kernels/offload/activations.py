"""Saved tensors in host memory between forward and backward (§6.1, §6.6)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 1 << 20


def offload_saved_tensors(min_bytes: int = SMALLEST) -> saved_tensors_hooks:
    """Context manager: what autograd saves inside goes to host memory, and comes back when the backward asks for it.

        with offload_saved_tensors():
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)

    Around checkpointed blocks only their positional arguments are saved, so only block inputs move: pass as arguments
    what differs from block to block and close over what all blocks share. Gradients are bit-equal with and without.

    Left where they are: tensors on the CPU, for which there is nothing to gain; parameters and other leaves that need
    a gradient, and views of them, which their owner keeps alive anyway; tensors under min_bytes.

    On CUDA the copy to pinned host memory runs on a side stream, beside the forward. The copy back runs on the stream
    of the backward. As without the context, a tensor must not be changed in place once it is saved.
    """
    return saved_tensors_hooks(lambda tensor: _pack(tensor, min_bytes), _unpack)


@dataclass(frozen=True)
class _InHostMemory:
    """A tensor's copy; `copied` is the event of its copy on CUDA, None where the copy is complete."""

    tensor: Tensor
    device: torch.device
    copied: torch.cuda.Event | None


def _pack(tensor: Tensor, min_bytes: int) -> Tensor | _InHostMemory:
    if not _is_offloadable(tensor, min_bytes):
        return tensor
    if tensor.device.type != "cuda":
        return _InHostMemory(_host_buffer(tensor, pinned=False).copy_(tensor), tensor.device, None)
    buffer = _host_buffer(tensor, pinned=True)
    side = _side_stream(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        buffer.copy_(tensor, non_blocking=True)
        # The allocator must not give the device memory away before the side stream has read it.
        tensor.record_stream(side)
        copied = side.record_event()
    return _InHostMemory(buffer, tensor.device, copied)


def _unpack(saved: Tensor | _InHostMemory) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    if saved.copied is not None:
        torch.cuda.current_stream(saved.device).wait_event(saved.copied)
    return saved.tensor.to(saved.device, non_blocking=saved.copied is not None)


def _is_offloadable(tensor: Tensor, min_bytes: int) -> bool:
    owner = tensor if tensor._base is None else tensor._base
    owned_elsewhere = isinstance(owner, nn.Parameter) or (owner.is_leaf and owner.requires_grad)
    return _on_accelerator(tensor) and not owned_elsewhere and tensor.nbytes >= min_bytes


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _host_buffer(tensor: Tensor, pinned: bool) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
