"""What a job encodes with: the VAE of HunyuanVideo, for videos and pictures, or that of FLUX, for pictures (§5.1)."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from k5kernels.latents.video import Bucket
from k5kernels.vae import FluxVAE, HunyuanEncoder, weights
from k5kernels.vae.plan import Mode

Encoder = HunyuanEncoder | FluxVAE
FLUX = "AutoencoderKL"  # diffusers' name of its class


def load(path: str | Path, device: torch.device, dtype: torch.dtype) -> Encoder:
    """path: as `k5kernels.vae.weights.load_encoder` takes it, or a folder of diffusers with FLUX's VAE.

    Raises as that function; ValueError also where diffusers is missing.
    """
    if not _is_flux(Path(path)):
        return weights.load_encoder(path).to(device, dtype)
    try:
        encoder = FluxVAE.from_pretrained(path)
    except ImportError as error:
        raise ValueError(f"{path}: FLUX's VAE needs the package diffusers: pip install diffusers") from error
    encoder.vae.to(device, dtype)
    return encoder


def check(encoder: Encoder, clip_frames: int, bucket: Bucket, mode: Mode, memory_budget: int | None) -> None:
    """Raises ValueError where the encoder cannot take clips of this length and size so."""
    if isinstance(encoder, HunyuanEncoder):
        encoder.plan((1, 3, clip_frames, *bucket), mode, memory_budget)
    elif clip_frames != 1:
        raise ValueError(f"clip_frames: expected 1 with FLUX's VAE, which encodes pictures, got {clip_frames}")
    elif memory_budget is not None:
        raise ValueError("memory_budget: expected none with FLUX's VAE, which takes a picture as it is")


def most_together(encoder: Encoder, size: tuple[int, int, int], mode: Mode, memory_budget: int | None) -> int:
    """How many clips of (frames, height, width) the budget lets through together, one at least."""
    if memory_budget is None or not isinstance(encoder, HunyuanEncoder):
        return sys.maxsize
    return max(1, memory_budget // encoder.plan((1, 3, *size), mode, memory_budget).peak_bytes)


def latent(encoder: Encoder, video: Tensor, mode: Mode, memory_budget: int | None) -> Tensor:
    """[B, 16, T, h, w] of videos [B, 3, F, H, W] in [-1, 1], together where the budget allows it: the mean, shifted and
    scaled as the models take it."""
    if isinstance(encoder, HunyuanEncoder):
        if memory_budget is None and len(video) > 1:  # without a budget clips go one by one
            memory_budget = len(video) * encoder.plan((1, *video.shape[1:]), mode).peak_bytes
        return encoder.encode(video, mode, memory_budget).mode() * encoder.config.scaling_factor
    return (encoder.encode(video, mode).mode() - (encoder.config.shift_factor or 0)) * encoder.config.scaling_factor


def dtype_of(encoder: Encoder) -> str:
    module = encoder if isinstance(encoder, HunyuanEncoder) else encoder.vae
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def fingerprint(encoder: Encoder) -> str:
    """Hash of configuration and weights."""
    if isinstance(encoder, HunyuanEncoder):
        return _hash(repr(encoder.config), encoder.state_dict())
    scale = (encoder.config.scaling_factor, encoder.config.shift_factor)
    half = {name: one for name, one in encoder.vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
    return _hash(repr((FLUX, encoder.config.block_out_channels, scale)), half)


def _hash(configuration: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(configuration.encode())
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_flux(path: Path) -> bool:
    for file in (path / "vae" / "config.json", path / "config.json"):
        if file.is_file():
            try:
                return json.loads(file.read_bytes()).get("_class_name") == FLUX
            except (ValueError, AttributeError, RecursionError):
                return False  # which `load_encoder` tells
    return False
