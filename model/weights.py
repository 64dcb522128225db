"""CrossDiT weights in and out: one safetensors file, or a folder in diffusers' layout.

The file's metadata holds the config as JSON, in the words of diffusers' config.json; parameter names are the
released ones.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k5kernels.atomic import replacing
from k5kernels.presets import CrossDiTConfig
from model.crossdit import CrossDiT

_FOLDER_FILE = "diffusion_pytorch_model.safetensors"
_RENAMED = {"text_blocks": "num_text_blocks", "visual_blocks": "num_visual_blocks"}


class WeightsError(ValueError):
    """A file that does not hold the weights of a CrossDiT."""


def save_crossdit(path: str | os.PathLike[str], model: CrossDiT, dtype: torch.dtype | None = None) -> None:
    """Write the model's parameters to one safetensors file.

    dtype: of the stored parameters; None stores each as it is. The file appears under its name when whole; a
    failed write leaves what was there before.
    """
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial, {"format": "pt", "config": json.dumps(config_to_json(model.config))})


def load_crossdit(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> CrossDiT:
    """The model stored at path, on the CPU, in evaluation mode.

    path: a file of `save_crossdit`, or a folder with config.json and diffusion_pytorch_model*.safetensors.
    dtype: of the parameters; the time and modulation layers stay in float32. Video Pro takes 77 GB in float32:
    give torch.bfloat16.

    Raises WeightsError where the path holds no readable weights, or not those its config asks for.
    """
    path = Path(path)
    config, files = _read(path)
    with torch.device("meta"):
        model = CrossDiT(config).to(dtype)
    expected = model.state_dict()
    state = {name: tensor.to(expected[name].dtype) for name, tensor in _read_checked(path, files, expected).items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_crossdit_config(path: str | os.PathLike[str]) -> CrossDiTConfig:
    """The config of the model stored at path, as in `load_crossdit`, without its weights."""
    return _read(Path(path))[0]


def config_to_json(config: CrossDiTConfig) -> dict[str, Any]:
    """The config in the words of diffusers' config.json."""
    return {_RENAMED.get(name, name): value for name, value in asdict(config).items()}


def config_from_json(entries: dict[str, Any]) -> CrossDiTConfig:
    """The config that diffusers' config.json describes; what is no size of the model is passed over."""
    try:
        known: dict[str, Any] = {
            field.name: entries[_RENAMED.get(field.name, field.name)] for field in fields(CrossDiTConfig)
        }
        for name in ("axes_dims", "patch_size"):
            known[name] = tuple(known[name])
        return CrossDiTConfig(**known)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"not the config of a CrossDiT: {error!r}") from error


def _read(path: Path) -> tuple[CrossDiTConfig, list[Path]]:
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> tuple[CrossDiTConfig, list[Path]]:
    with _open(path) as file:
        metadata = file.metadata() or {}
    if "config" not in metadata:
        raise WeightsError(
            f"{path}: no config in the metadata; give a file written by save_crossdit, or the folder with config.json"
        )
    return config_from_json(json.loads(metadata["config"])), [path]


def _read_folder(folder: Path) -> tuple[CrossDiTConfig, list[Path]]:
    config, index = folder / "config.json", folder / f"{_FOLDER_FILE}.index.json"
    if not config.exists():
        raise WeightsError(f"{folder}: expected config.json and {_FOLDER_FILE} in this folder; is it its parent?")
    names = {_FOLDER_FILE}
    try:
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
        return config_from_json(json.loads(config.read_text())), [folder / name for name in sorted(names)]
    except (json.JSONDecodeError, KeyError) as error:
        raise WeightsError(f"{folder}: unreadable config.json or index: {error!r}") from error


def _read_checked(path: Path, files: list[Path], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in files:
        with _open(name) as file:
            state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        raise WeightsError(f"{path}: {_some('missing', missing)}; {_some('unexpected', unexpected)}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"{path}: {key}: the config asks for {list(expected[key].shape)}, the file has {list(tensor.shape)}"
            )
    return state


def _open(path: Path) -> safe_open:
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error


def _some(word: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {word}" + (f" ({shown})" if names else "")
