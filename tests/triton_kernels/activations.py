"""Activations of the VAE, and tiles so small that few positions need several, for the tests of GroupNorm's kernels."""

import torch
from torch import Tensor

from k5kernels.triton import groupnorm_statistics, position_tiles, token_runs

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def activation(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False, seed: int = 0) -> Tensor:
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1).to(dtype)
    return x.contiguous(memory_format=FORMATS[x.ndim]) if channels_last else x


def parameters(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """mean, variance, weight and bias; the statistics are not those of x, and float32 holds them exactly."""
    random = torch.Generator().manual_seed(2)
    mean = torch.randn(x.shape[0], groups, generator=random).double()
    variance = (1 + torch.rand(x.shape[0], groups, generator=random)).double()
    weight, bias = (torch.randn(x.shape[1], generator=random) for _ in range(2))
    return mean, variance, weight, bias


def make_small(monkeypatch) -> None:
    """Several tiles a run, several runs a sample, several blocks of channels, several steps of every merge."""
    monkeypatch.setattr(position_tiles, "VALUES", 16)
    monkeypatch.setattr(position_tiles, "CHANNELS", 2)
    monkeypatch.setattr(position_tiles, "ELEMENTWISE_TILES", 2)
    monkeypatch.setattr(position_tiles, "SUMMED_RUNS", 4)
    monkeypatch.setattr(groupnorm_statistics, "MERGED_VALUES", 8)
    monkeypatch.setattr(token_runs, "SUMMED_RUNS", 2)
    monkeypatch.setattr(token_runs, "SUMMED_COLUMNS", 4)
