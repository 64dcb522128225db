"""CrossDiT weights in and out: one safetensors file, or a folder in diffusers' layout.

The file's metadata holds the config as JSON, in the words of diffusers' config.json; parameter names are the
released ones.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from k5kernels.presets import CrossDiTConfig
from k5kernels.weight_files import TRANSFORMER, StoredWeights, WeightsError, open_weights, write_weights
from model.crossdit import CrossDiT

__all__ = [
    "WeightsError",
    "config_from_json",
    "config_to_json",
    "load_crossdit",
    "read_crossdit_config",
    "save_crossdit",
]

_RENAMED = {"text_blocks": "num_text_blocks", "visual_blocks": "num_visual_blocks"}


def save_crossdit(
    path: str | os.PathLike[str],
    model: CrossDiT,
    dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model's parameters to one safetensors file; the same model gives the same bytes.

    dtype: of the stored parameters; None stores each as it is. state: written in place of the model's own, for a model
    whose parameters are shards. The file appears under its name when whole; a
    failed write leaves what was there before.

    Raises ValueError, by name, where a parameter is NaN or infinite in that dtype, OSError where the file cannot be
    written.
    """
    write_weights(path, model.state_dict() if state is None else state, config_to_json(model.config), dtype)


def load_crossdit(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> CrossDiT:
    """The model stored at path, on the CPU, in evaluation mode.

    path: a file of `save_crossdit`, a folder of diffusers with config.json and diffusion_pytorch_model*.safetensors,
    or a pipeline's folder that has it in `transformer`.
    dtype: of the parameters; the time and modulation layers stay in float32. Video Pro takes 77 GB in float32:
    give torch.bfloat16.

    Raises WeightsError where the path holds no readable weights, or not those its config asks for; OSError where it
    cannot be read.
    """
    stored = open_weights(path, TRANSFORMER)
    config = _config(stored)
    model = stored.build(lambda: CrossDiT(config), config.text_blocks + config.visual_blocks).to(dtype)
    model.load_state_dict(dict(stored.read(model.state_dict())), assign=True)
    return model.eval()


def read_crossdit_config(path: str | os.PathLike[str]) -> CrossDiTConfig:
    """The config of the model stored at path, as in `load_crossdit`, without its weights."""
    return _config(open_weights(path, TRANSFORMER))


def config_to_json(config: CrossDiTConfig) -> dict[str, Any]:
    """The config in the words of diffusers' config.json."""
    return {_RENAMED.get(name, name): value for name, value in asdict(config).items()}


def config_from_json(entries: dict[str, Any]) -> CrossDiTConfig:
    """The config that diffusers' config.json describes; what is no size of the model is passed over.

    Raises WeightsError where a size is missing or no size.
    """
    known: dict[str, Any] = {}
    for field in fields(CrossDiTConfig):
        name = _RENAMED.get(field.name, field.name)
        if name not in entries:
            described = entries.get("_class_name", "another model")
            raise WeightsError(f"expected the config of a CrossDiT, with {name}; got that of {described!s:.80}")
        known[field.name] = _size(name, entries[name])
    try:
        return CrossDiTConfig(**known)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"not the config of a CrossDiT: {error}") from error


def _size(name: str, value: Any) -> Any:
    """A value of the config, tuples in place of JSON's lists."""
    if name == "visual_cond":
        expected, fits = "true or false", isinstance(value, bool)
    elif name in ("axes_dims", "patch_size"):
        expected, fits = "a list of whole numbers", isinstance(value, list) and all(type(n) is int for n in value)
    else:
        least = 0 if name in _RENAMED.values() else 1
        expected, fits = f"a whole number from {least}", type(value) is int and value >= least
    if not fits:
        raise WeightsError(f"not the config of a CrossDiT: expected {expected} as {name}, got {value!r:.80}")
    return tuple(value) if isinstance(value, list) else value


def _config(stored: StoredWeights) -> CrossDiTConfig:
    try:
        return config_from_json(stored.config)
    except WeightsError as error:
        raise WeightsError(f"{stored.path}: {error}") from error
