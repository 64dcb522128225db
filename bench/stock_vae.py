"""diffusers' VAE with tiling on, what the VAE is measured against."""

from typing import Any

import torch
from torch import nn

from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig


def stock_vae(config: VAEConfig, encoder: HunyuanEncoder | None = None, decoder: HunyuanDecoder | None = None) -> Any:
    """Untrained, or with the weights of these halves. Its tiles are its defaults: 256 pixels every 192, 16 frames every
    12."""
    from diffusers import AutoencoderKLHunyuanVideo  # which a bare machine with a GPU may lack

    torch.manual_seed(0)
    vae: Any = AutoencoderKLHunyuanVideo(
        block_out_channels=config.widths, norm_num_groups=config.groups, layers_per_block=config.layers_per_block
    )
    weights: dict[str, torch.Tensor] = {}
    halves: tuple[nn.Module | None, ...] = (encoder, decoder)
    for half in halves:
        if isinstance(half, HunyuanEncoder | HunyuanDecoder):
            prefix, conv = half.RELEASED_NAMES
            state = half.state_dict()
            weights |= {name if name.startswith(conv) else prefix + name: tensor for name, tensor in state.items()}
    vae.load_state_dict(weights, strict=False)
    vae.enable_tiling()
    return vae.eval()
