"""Small VAEs with random weights, ours and diffusers', for the tests of this folder."""

import torch
from diffusers import AutoencoderKLHunyuanVideo

from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig

CONFIG = VAEConfig(widths=(16, 32, 64, 48), groups=8)
TINIEST = VAEConfig(widths=(8, 8, 8, 8), groups=4, layers_per_block=1)
TINY = VAEConfig(widths=(8, 8, 16, 16), groups=4, layers_per_block=1)


def diffusers_vae(config: VAEConfig = CONFIG) -> AutoencoderKLHunyuanVideo:
    """diffusers' model, untiled, every parameter random: biases and norms too."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=config.widths,
        norm_num_groups=config.groups,
        layers_per_block=config.layers_per_block,
        scaling_factor=config.scaling_factor,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = vae.use_tiling = False
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return vae.eval()


def released_names(state: dict, prefix: str, conv: str) -> dict:
    """The part of diffusers' state dict that is one of our halves, under our names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith((prefix, conv))}


def matching_encoder(vae: AutoencoderKLHunyuanVideo) -> HunyuanEncoder:
    encoder = HunyuanEncoder(CONFIG).eval()
    encoder.load_state_dict(released_names(vae.state_dict(), "encoder.", "quant_conv."))
    return encoder


def matching_decoder(vae: AutoencoderKLHunyuanVideo) -> HunyuanDecoder:
    decoder = HunyuanDecoder(CONFIG).eval()
    decoder.load_state_dict(released_names(vae.state_dict(), "decoder.", "post_quant_conv."))
    return decoder


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())
