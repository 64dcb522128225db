"""The model that a run starts with: sizes, weights, and what it does with its activations."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from k5kernels.offload import ActivationOffload
from k5kernels.presets import CrossDiTConfig
from model.crossdit import CrossDiT
from model.presets import PRESETS
from model.weights import load_crossdit, read_crossdit_config
from train.settings import Settings

WEIGHTS = "crossdit.safetensors"  # what a run leaves in its folder
TEXT_WIDTH = 384  # of MiniLM's tokens
MLP_WIDENING = 4  # of the released models
SMALLEST_OFFLOADED = 1 << 16  # bytes; around checkpointed blocks nothing but their inputs is saved


def weights_to_start_from(init: Path) -> Path:
    """The path itself, or the weights in it where it is the folder of a run."""
    return init / WEIGHTS if (init / WEIGHTS).is_file() else init


def model_config(settings: Settings, init: Path | None, model_dim: int | None, blocks: int | None) -> CrossDiTConfig:
    """The config of the weights to start from, or the preset's, with another width or depth where given.

    Raises ValueError where they contradict each other or the width cannot be.
    """
    if init is not None:
        if model_dim is not None or blocks is not None:
            raise ValueError("the weights of --init have their own sizes: leave out --model-dim and --blocks")
        return read_crossdit_config(init)
    config = PRESETS[settings.preset]
    if model_dim is not None:
        if model_dim % config.head_dim:
            raise ValueError(f"--model-dim: expected a multiple of the head dim {config.head_dim}, got {model_dim}")
        config = replace(config, model_dim=model_dim, ff_dim=MLP_WIDENING * model_dim)
    return config if blocks is None else replace(config, visual_blocks=blocks)


def check_text_width(config: CrossDiTConfig, preset: str) -> None:
    """Raises ValueError where the model takes text of another width than the trainer's encoder gives."""
    if config.in_text_dim != TEXT_WIDTH:
        raise ValueError(
            f"preset: expected nano: {preset} takes text of width {config.in_text_dim}, this trainer's encoder gives "
            f"{TEXT_WIDTH}"
        )


def build_model(
    config: CrossDiTConfig, init: Path | None, checkpointing: bool, seed: int, device: torch.device
) -> CrossDiT:
    """Random weights, or weights from a file."""
    torch.manual_seed(seed)
    model = load_crossdit(init) if init is not None else CrossDiT(config)
    model.gradient_checkpointing = checkpointing
    return model.to(device)


def offload_to(folder: Path, device: torch.device, budget_bytes: float) -> ActivationOffload:
    """Block inputs to host memory from a GPU, to a file in the folder from the CPU."""
    on_cpu = device.type == "cpu"
    return ActivationOffload(folder if on_cpu else None, budget_bytes=budget_bytes, min_bytes=SMALLEST_OFFLOADED)


def weights_digest(path: Path) -> str:
    """A hash of a weights file, or of all in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"
