"""Weights of the HunyuanVideo VAE in and out, in the released layout.

One safetensors file holds encoder and decoder under the released names (`encoder.*`, `quant_conv.*`, `decoder.*`,
`post_quant_conv.*`), and the configuration as JSON in its metadata under `config`, with diffusers' keys. So the
tensors of our file and of a diffusers VAE folder are the same, and either loads.
"""

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig
from k5kernels.vae.decoder import HunyuanDecoder
from k5kernels.vae.encoder import HunyuanEncoder
from k5kernels.weight_files import VAE, WeightsError, open_weights, write_weights

Half = TypeVar("Half", HunyuanEncoder, HunyuanDecoder)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What this library builds; a configuration that says otherwise is another model.
FIXED = {
    "_class_name": "AutoencoderKLHunyuanVideo",
    "act_fn": "silu",
    "in_channels": 3,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "spatial_compression_ratio": SPATIAL_STRIDE,
    "temporal_compression_ratio": TEMPORAL_STRIDE,
}


def load_encoder(path: str | Path) -> HunyuanEncoder:
    """Encoder in float32, in eval mode.

    path: a safetensors file of `save_vae`, a VAE folder of diffusers, or a pipeline's folder that has it in `vae`.
    Raises WeightsError, a ValueError, where the path is missing, damaged, or holds another model; OSError where it
    cannot be read.
    """
    return _load(path, HunyuanEncoder)


def load_decoder(path: str | Path) -> HunyuanDecoder:
    """Decoder in float32, in eval mode; paths and errors as `load_encoder`."""
    return _load(path, HunyuanDecoder)


def half_of_diffusers(vae: nn.Module, half: type[Half]) -> Half:
    """Encoder or decoder with a copy of the weights of diffusers' AutoencoderKLHunyuanVideo, in their dtype and on
    their device, in eval mode. Raises ValueError where it is another model."""
    model, weights = empty_half_of_diffusers(vae, half), weights_of_diffusers(vae, half)
    first = next(iter(weights.values()))
    model = model.to(first.dtype).to_empty(device=first.device)
    model.load_state_dict(weights)
    return model


def empty_half_of_diffusers(vae: nn.Module, half: type[Half]) -> Half:
    """The same without weights: on the device "meta"."""
    settings = dict(getattr(vae, "config", {}))
    if "block_out_channels" not in settings:
        raise ValueError(f"vae: expected diffusers' {FIXED['_class_name']}, got {type(vae).__name__}")
    settings["_class_name"] = type(vae).__name__
    config = _from_json(settings, "vae")
    with torch.device("meta"):
        return half(config).eval()


def weights_of_diffusers(vae: nn.Module, half: type[Half]) -> dict[str, torch.Tensor]:
    """The weights of this half of diffusers' VAE, not copied, under the half's names."""
    prefix, conv = half.RELEASED_NAMES
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in vae.state_dict().items()
        if name.startswith((prefix, conv))
    }


def save_vae(
    path: str | Path, encoder: HunyuanEncoder, decoder: HunyuanDecoder, dtype: torch.dtype = torch.float16
) -> None:
    """Write both to one safetensors file, whole or not at all.

    dtype: float16, bfloat16 or float32. Raises ValueError where the two have different configurations or a weight
    does not fit the dtype, OSError where the file cannot be written.
    """
    if encoder.config != decoder.config:
        raise ValueError(f"expected encoder and decoder of one VAE, got {encoder.config} and {decoder.config}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype}")
    tensors = {
        _released_name(name, *half.RELEASED_NAMES): tensor
        for half in (encoder, decoder)
        for name, tensor in half.state_dict().items()
    }
    write_weights(path, tensors, _to_json(encoder.config), dtype)


def _load(path: str | Path, half: type[Half]) -> Half:
    prefix, conv = half.RELEASED_NAMES
    stored = open_weights(path, VAE)
    config = _from_json(stored.config, path)
    model = stored.build(lambda: half(config), config.layers_per_block)
    named = {_released_name(name, prefix, conv): tensor for name, tensor in model.state_dict().items()}
    tensors = stored.read(named, within=(prefix, conv))
    # Parameters are allocated without initialization, so that loading draws no random numbers.
    model.to_empty(device="cpu")
    parameters = {_released_name(name, prefix, conv): parameter for name, parameter in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in tensors:
            parameters[name].copy_(tensor)
    return model.eval()


def _released_name(name: str, prefix: str, conv: str) -> str:
    return name if name.startswith(conv) else prefix + name


def _to_json(config: VAEConfig) -> dict[str, Any]:
    return FIXED | {
        "block_out_channels": list(config.widths),
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scaling_factor,
    }


def _from_json(settings: dict[str, Any], path: str | Path) -> VAEConfig:
    """Keys that are left out have diffusers' defaults, which are HunyuanVideo's values."""
    for key, value in FIXED.items():
        if settings.get(key, value) != value:
            raise WeightsError(f"{path}: expected the VAE of HunyuanVideo ({key} = {value}), got {settings[key]}")
    default = VAEConfig()
    try:
        config = VAEConfig(
            widths=tuple(settings.get("block_out_channels", default.widths)),
            groups=int(settings.get("norm_num_groups", default.groups)),
            layers_per_block=int(settings.get("layers_per_block", default.layers_per_block)),
            latent_channels=int(settings.get("latent_channels", default.latent_channels)),
            scaling_factor=float(settings.get("scaling_factor", default.scaling_factor)),
        )
    except (OverflowError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: expected a VAE configuration ({error})") from error
    if not (math.isfinite(config.scaling_factor) and config.scaling_factor > 0):
        raise WeightsError(f"{path}: expected a positive scaling_factor, got {config.scaling_factor}")
    return config
