"""The order of dimensions in memory that the operators of the VAE keep."""

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_like(x: Tensor) -> torch.memory_format:
    """The format of results: channels last where x [B, C, (T,) H, W] has channels innermost, else contiguous."""
    channels_innermost = not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1
    return _CHANNELS_LAST.get(x.ndim, torch.contiguous_format) if channels_innermost else torch.contiguous_format
