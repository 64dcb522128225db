"""A CrossDiT small enough for any test, with weights under which every layer matters, and inputs for it."""

import torch
from torch import Tensor

from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT

CONFIG = CrossDiTConfig(
    model_dim=64,
    time_dim=24,
    ff_dim=96,
    text_blocks=1,
    visual_blocks=2,
    axes_dims=(8, 12, 12),
    in_text_dim=20,
    in_text_dim2=12,
)


def random_model(config: CrossDiTConfig = CONFIG, seed: int = 0) -> CrossDiT:
    """Weights under which every layer moves the output: modulation not zero, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = CrossDiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            if "_norm." in name:
                parameter.copy_(1.5 + parameter)
    return model.eval()


def inputs(batch: int, grid: tuple[int, int, int], config: CrossDiTConfig = CONFIG, length: int = 7, seed: int = 1):
    """A latent, times and text for a grid of (frames, latent height, latent width)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *grid, config.input_channels, generator=generator)
    tokens = torch.randn(batch, length, config.in_text_dim, generator=generator)
    pooled = torch.randn(batch, config.in_text_dim2, generator=generator)
    return x, torch.linspace(100, 900, batch), TextCondition(tokens, None, pooled)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
