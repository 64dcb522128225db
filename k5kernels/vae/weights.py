"""Weights of the HunyuanVideo VAE in and out, in the released layout.

One safetensors file holds encoder and decoder under the released names (`encoder.*`, `quant_conv.*`, `decoder.*`,
`post_quant_conv.*`), and the configuration as JSON in its metadata under `config`, with diffusers' keys. So the
tensors of our file and of a diffusers VAE folder are the same, and either loads.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k5kernels.atomic import replacing
from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig
from k5kernels.vae.decoder import HunyuanDecoder
from k5kernels.vae.encoder import HunyuanEncoder

Half = TypeVar("Half", HunyuanEncoder, HunyuanDecoder)

FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
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
    """Encoder in float32, in eval mode, from a safetensors file of `save_vae` or a diffusers VAE folder.

    Raises ValueError where the file is missing, damaged, or holds another model.
    """
    return _load(path, HunyuanEncoder, "encoder.", "quant_conv.")


def load_decoder(path: str | Path) -> HunyuanDecoder:
    """Decoder in float32, in eval mode; paths and errors as `load_encoder`."""
    return _load(path, HunyuanDecoder, "decoder.", "post_quant_conv.")


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
        _released_name(name, prefix, conv): tensor.detach().to("cpu", dtype).contiguous()
        for half, prefix, conv in ((encoder, "encoder.", "quant_conv."), (decoder, "decoder.", "post_quant_conv."))
        for name, tensor in half.state_dict().items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite weights in {dtype}, got inf or nan; save as torch.float32")
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, {"format": "pt", "config": json.dumps(_to_json(encoder.config))})
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error


def _load(path: str | Path, half: type[Half], prefix: str, conv: str) -> Half:
    with _open(Path(path)) as (file, settings):
        with torch.device("meta"):
            model = half(_from_json(settings, path))
        stored = set(file.keys())
        names = {name: _released_name(name, prefix, conv) for name in model.state_dict()}
        _check_names(path, set(names.values()), {name for name in stored if name.startswith((prefix, conv))})
        # Parameters are allocated without initialization, so that loading draws no random numbers.
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                _copy(path, names[name], file.get_tensor(names[name]), parameter)
    return model.eval()


def _released_name(name: str, prefix: str, conv: str) -> str:
    return name if name.startswith(conv) else prefix + name


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open safetensors file, and the configuration beside it or in its metadata."""
    weights = path / FOLDER_WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        expected = "a diffusers VAE folder" if path.is_dir() else "a safetensors file or a diffusers VAE folder"
        raise ValueError(f"{path}: expected {expected}, found no file {weights.name}")
    try:
        with safe_open(weights, framework="pt") as file:
            if path.is_dir():
                text = (path / FOLDER_CONFIG).read_text() if (path / FOLDER_CONFIG).is_file() else None
            else:
                text = (file.metadata() or {}).get("config")
            if text is None:
                where = f"a {FOLDER_CONFIG} in the folder" if path.is_dir() else "`config` in the file's metadata"
                raise ValueError(f"{path}: expected {where}, found none; is this a VAE that save_vae wrote?")
            yield file, json.loads(text)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a whole VAE in safetensors format ({error})") from error


def _check_names(path: str | Path, expected: set[str], stored: set[str]) -> None:
    for problem, names in (("lacks", expected - stored), ("has unknown", stored - expected)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"{path}: expected the VAE of its configuration, {problem} {len(names)} tensors: {some}")


def _copy(path: str | Path, name: str, stored: Tensor, parameter: Tensor) -> None:
    if stored.shape != parameter.shape or not stored.is_floating_point():
        expected, got = f"{list(parameter.shape)} floating", f"{list(stored.shape)} {stored.dtype}"
        raise ValueError(f"{path}: {name}: expected {expected}, got {got}")
    parameter.copy_(stored)


def _to_json(config: VAEConfig) -> dict[str, Any]:
    return FIXED | {
        "block_out_channels": list(config.widths),
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scaling_factor,
    }


def _from_json(settings: Any, path: str | Path) -> VAEConfig:
    """Keys that are left out have diffusers' defaults, which are HunyuanVideo's values."""
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object as configuration, got {type(settings).__name__}")
    for key, value in FIXED.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: expected the VAE of HunyuanVideo ({key} = {value}), got {settings[key]}")
    default = VAEConfig()
    try:
        return VAEConfig(
            widths=tuple(settings.get("block_out_channels", default.widths)),
            groups=int(settings.get("norm_num_groups", default.groups)),
            layers_per_block=int(settings.get("layers_per_block", default.layers_per_block)),
            latent_channels=int(settings.get("latent_channels", default.latent_channels)),
            scaling_factor=float(settings.get("scaling_factor", default.scaling_factor)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a VAE configuration ({error})") from error
