"""Which device to run on, and which one a module is on."""

import torch
from torch import nn


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1"); without one the GPU where there is one, else the CPU.

    Raises ValueError where the name is of another kind, or this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'device: expected "cpu", "cuda" or "cuda:N", got {name!r}')
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(
            f"device: {name} is not here: PyTorch {torch.__version__} sees {gpus} GPUs; leave it out, or give cpu"
        )
    return device


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters of a module are."""
    return next(module.parameters()).device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
