"""`winograd_conv3d` on activations of the VAE, against PyTorch's convolution (oneDNN) of the same tensors.

The VAE takes it from the narrowest layers on, wherever a frame fills enough of its tiles, so that the choice depends on
nothing but the shapes (`k5kernels.vae.convolution`).
"""

import pytest
import torch
import torch.nn.functional as F

from bench.harness import compare
from k5kernels.ops.winograd_conv3d import winograd_conv3d, winograd_filters

# Channels, output size, floor: layers of the released widths, of a quarter of them and of the nano VAE; an image.
SIZES = {
    "16": (16, (9, 96, 96), 1.5),
    "32": (32, (9, 96, 96), 1.5),
    "64": (64, (9, 96, 96), 2.0),
    "128": (128, (9, 48, 96), 2.0),
    "256": (256, (9, 48, 48), 2.0),
    "512": (512, (5, 32, 48), 2.0),
    "512 image": (512, (1, 32, 48), 2.0),
}
LARGEST_ERROR = 1e-5  # of the largest value, against float64
ROUNDS = 5


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_winograd_conv3d(benchmark, name):
    channels, (frames, height, width), floor = SIZES[name]
    x = torch.randn(1, channels, frames + 2, height + 2, width + 2).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(channels, channels, 3, 3, 3) / (27 * channels) ** 0.5, torch.randn(channels)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    filters = winograd_filters(weight)
    # A corner: float64 of all would take a minute.
    exact = F.conv3d(x[:, :, :3, :18, :18].double(), weight.double(), bias.double())

    def check(out):
        error = float((out[:, :, :1, :16, :16] - exact).abs().max() / exact.abs().max())
        assert error < LARGEST_ERROR, f"error {error:.1e}"

    compare(
        benchmark,
        f"{channels} channels, {frames}x{height}x{width}",
        {"ours": lambda: winograd_conv3d(x, filters, bias), "oneDNN": lambda: F.conv3d(x, weight, bias)},
        check,
        floors={"oneDNN": floor},
        rounds=ROUNDS,
    )
