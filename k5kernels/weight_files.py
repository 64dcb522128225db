"""A model's weights on disk: found, read with every tensor checked, and written.

A safetensors file with the config as JSON in its metadata under `config`, or a folder in diffusers' layout: config.json
beside `diffusion_pytorch_model.safetensors`, its variant (`….fp16.safetensors`) or its shards with their index. Names
that common tools put before a parameter's own (`transformer.`, `module.`, `_orig_mod.`) are taken off.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from k5kernels.atomic import replacing

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(.*\.)?safetensors$")
MOST_QUOTED = 160
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# How a file begins that is no safetensors file, and what to do about it.
_OTHER_FORMATS = {
    b"GGUF": "a GGUF file, whose quantized weights are not read; give the safetensors weights in float16 or bfloat16",
    b"PK\x03\x04": "pickle",
    b"\x80\x02": "pickle",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch the file with `git lfs pull`",
}
_PICKLE = (
    "a pickle, which can run code when it is read; convert it where you trust it: "
    "safetensors.torch.save_file(torch.load(file, weights_only=True), …)"
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_ADAPTER_WORDS = ("lora_", ".lora.", "hada_", "lokr_", "dora_scale", "ip_adapter", "adapter_modules")
_QUANTIZED_WORDS = ("scale", "absmax", "quant_state", "quant_map", "SCB", "zero_point", "qweight", "qzeros")
# Modules that torch.compile, DDP, FSDP and activation checkpointing put around others, at any depth.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Other models in files that hold several; the parts of this library name their own prefixes (`Part`).
_OTHER_MODELS = (
    *("cond_stage_model.", "conditioner.", "first_stage_model.", "model.diffusion_model.", "model_ema."),
    *("text_encoder.", "text_encoder_2.", "text_encoders.", "transformer.", "vae."),
)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


M = TypeVar("M", bound=nn.Module)


class WeightsError(ValueError):
    """A path that does not hold the weights it was given for."""


@dataclass(frozen=True)
class Part:
    """A model of a pipeline. name: its folder there. prefixes: of its parameters in files that hold several models."""

    name: str
    prefixes: tuple[str, ...]


TRANSFORMER = Part("transformer", ("model.diffusion_model.", "diffusion_model.", "transformer.", "model."))
VAE = Part("vae", ("first_stage_model.", "vae."))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it. name: in the file. dtype: in the words of safetensors."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredWeights:
    """What `open_weights` found. tensors: by name, without the names of wrapping modules."""

    path: Path
    part: Part
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def build(self, make: Callable[[], M], layers: int) -> M:
        """make(), on the meta device: a model without memory, to compare the stored tensors with.

        layers: how many the config asks for. Raises WeightsError where the config describes no model that can be
        built, or far more layers than are stored.
        """
        if layers > len(self.tensors):
            raise WeightsError(
                f"{self.path}: the config asks for {layers} layers, {len(self.tensors)} tensors are stored"
            )
        try:
            with torch.device("meta"):
                return make()
        except (OverflowError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise WeightsError(
                f"{self.path}: the config describes no model that can be built ({_short(error)})"
            ) from error

    def read(self, expected: Mapping[str, Tensor], within: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every expected name, one in memory at a time, in the expected dtype, on the CPU.

        expected: of the shapes and dtypes to read; their values are not looked at. within: names that begin otherwise
        may be stored too and are left out. Names, shapes and dtypes of all are checked before the first is read.

        Raises WeightsError where a tensor is missing, unexpected, of another shape, not floating point, or holds NaN
        or infinity.
        """
        stored = self._named_as_expected(expected, within)
        for name, tensor in stored.items():
            if tensor.shape != expected[name].shape:
                asked, has = list(expected[name].shape), list(tensor.shape)
                raise WeightsError(f"{self.path}: {name}: the config asks for {asked}, the file has {has}")
        return self._read(stored, expected)

    def _read(self, stored: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for file in sorted({tensor.file for tensor in stored.values()}):
            with _opened(file) as reader:
                for name in (name for name, tensor in stored.items() if tensor.file == file):
                    tensor = reader.get_tensor(stored[name].name).to(expected[name].dtype)
                    if not _is_finite(tensor):
                        raise WeightsError(
                            f"{self.path}: {name}: holds NaN or infinite values in {tensor.dtype}; "
                            "the training or the conversion that wrote it went wrong"
                        )
                    yield name, tensor

    def _named_as_expected(self, expected: Mapping[str, Tensor], within: tuple[str, ...]) -> dict[str, StoredTensor]:
        prefix = self._prefix(expected)
        named = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        inside = {name: tensor for name, tensor in named.items() if name.startswith(within)}
        outside = [name for name in self.tensors if not name.startswith((prefix, *_OTHER_MODELS))]
        unexpected, missing = {*inside, *outside} - expected.keys(), expected.keys() - inside.keys()
        for name in sorted(expected.keys() & inside.keys()):
            if inside[name].dtype not in _DTYPES.values():
                self._refuse_quantized(f"{name}: stored as {inside[name].dtype}")
        for name in sorted(unexpected):
            if any(word in name.rsplit(".", 1)[-1] for word in _QUANTIZED_WORDS):
                self._refuse_quantized(f"{_short(name)}: a scale of quantized weights")
        if missing or unexpected:
            found = f"{_some('missing', missing)}; {_some('unexpected', unexpected)}"
            raise WeightsError(f"{self.path}: expected the {self.part.name} of its config: {found}")
        return inside

    def _prefix(self, expected: Mapping[str, Tensor]) -> str:
        """What stands before the expected names in these files."""
        prefixes = [
            prefix
            for prefix in ("", *self.part.prefixes)
            if any(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in self.tensors)
        ]
        if len(prefixes) > 1:
            raise WeightsError(
                f"{self.path}: holds the {self.part.name} more than once, its names after {_quoted(prefixes)}; "
                "keep one of them"
            )
        return prefixes[0] if prefixes else ""

    def _refuse_quantized(self, found: str) -> NoReturn:
        raise WeightsError(
            f"{self.path}: {found}; quantized weights are not read: give those in float16, bfloat16 or float32"
        )


def open_weights(path: str | os.PathLike[str], part: Part) -> StoredWeights:
    """The config and the tensors' names, shapes and dtypes at a path, no tensor read yet.

    path: a safetensors file with `config` in its metadata or config.json beside it, a folder of diffusers with one
    model, or a pipeline's folder with the part in its own folder.

    Raises WeightsError, in one line with what to do, where the path holds no whole safetensors weights, an adapter or
    no config; OSError where it cannot be read.
    """
    path = Path(path)
    folder = _folder_of(path, part) if path.is_dir() else path.parent
    if not path.is_dir() and _SHARD.search(path.name):
        raise WeightsError(f"{path}: one of several shards; give the folder they are in")
    files = _files_of(folder) if path.is_dir() else [path]
    tensors: dict[str, StoredTensor] = {}
    texts = []
    for file in files:
        with _opened(file) as reader:
            texts.append((reader.metadata() or {}).get("config"))
            for stored in _describe(file, reader):
                name = ".".join(word for word in stored.name.split(".") if word not in _WRAPPERS)
                if name in tensors:
                    other = tensors[name]
                    raise WeightsError(f"{path}: {_short(name)} is stored twice: {_place(other)} and {_place(stored)}")
                tensors[name] = stored
    for name in tensors:
        if any(word in name for word in _ADAPTER_WORDS):
            _refuse_adapter(path, name)
    return StoredWeights(path, part, _read_config(path, folder, texts), tensors)


def write_weights(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Write one safetensors file, whole or not at all; the same tensors and config give the same bytes.

    dtype: of the stored tensors, float8_e4m3fn to float64; None stores each as it is.
    The format's own writer is not used: it orders the metadata at random and, killed, leaves a temporary file.

    Raises ValueError, by name, where a tensor is not floating point or not finite in its dtype, OSError where the
    file cannot be written.
    """
    metadata = {"config": json.dumps(config), "format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    # Large elements first, so that each tensor stands at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name))
    end = 0
    for name in names:
        stored = dtype or tensors[name].dtype
        if stored not in _DTYPES:
            raise ValueError(f"{name}: expected a floating-point dtype, got {stored}")
        start, end = end, end + tensors[name].numel() * stored.itemsize
        header[name] = {"dtype": _DTYPES[stored], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    with replacing(path) as partial, partial.open("wb") as file:
        _write_header(file, header)
        for name in names:
            tensor = tensors[name].detach().to("cpu", dtype).contiguous()
            if not _is_finite(tensor):
                raise ValueError(f"{name}: expected finite weights in {tensor.dtype}, got inf or nan")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in text; raises WeightsError that begins with `where` for anything else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: not JSON ({_short(error)}); fetch or write it again") from error
    if not isinstance(parsed, dict):
        raise WeightsError(f"{where}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _write_header(file: IO[bytes], header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def _folder_of(path: Path, part: Part) -> Path:
    """The folder itself, or the part's folder inside a pipeline's."""
    if (path / CONFIG).exists() or _weights_in(path):
        return path
    if (path / part.name).is_dir():
        return path / part.name
    if (path / "model_index.json").exists():
        raise WeightsError(f"{path}: a pipeline without a folder {part.name}; fetch it, or give the folder that has it")
    return path


def _files_of(folder: Path) -> list[Path]:
    """The safetensors files of one model."""
    found = _weights_in(folder)
    plain = [name for name in found if name.removesuffix(".index.json") == f"{STEM}.safetensors"]
    candidates = plain or found
    if len(candidates) > 1:
        raise WeightsError(f"{folder}: expected the weights once, found {_quoted(candidates)}; keep one of them")
    if not candidates:
        _refuse_folder(folder)
    if not candidates[0].endswith(".json"):
        return [folder / candidates[0]]
    index = folder / candidates[0]
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(name, str) and _SHARD.search(name) and "/" not in name for name in shards):
        raise WeightsError(f"{index}: expected a weight_map to names of shards in its folder; fetch it again")
    if missing := {name for name in shards if not (folder / name).exists()}:
        raise WeightsError(f"{folder}: {_some('shards missing', missing)} that {index.name} names; fetch them")
    return [folder / name for name in sorted(set(shards))]


def _weights_in(folder: Path) -> list[str]:
    """Names of the weights in a folder: whole files, and the indices of those in shards."""
    names = sorted(file.name for file in folder.iterdir() if file.name.startswith(STEM))
    indices = [name for name in names if name.endswith(".json") and ".index." in name]
    return indices + [name for name in names if name.endswith(".safetensors") and not _SHARD.search(name)]


def _refuse_folder(folder: Path) -> NoReturn:
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        if name in _ADAPTER_FILES:
            _refuse_adapter(folder, name)
        if name.startswith(STEM) and _SHARD.search(name):
            raise WeightsError(f"{folder}: a shard ({name}) without {STEM}.safetensors.index.json; fetch the index")
    for name in names:
        if name.endswith(PICKLES):
            raise WeightsError(f"{folder}: {name} is {_PICKLE}")
    found = ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "nothing"
    raise WeightsError(f"{folder}: expected {CONFIG} and {STEM}.safetensors, found {found}; is it another folder?")


def _read_config(path: Path, folder: Path, texts: Iterable[str | None]) -> dict[str, Any]:
    """Of a folder: its config.json; of a file: its metadata; of either the other where that one has none."""
    stored = [text for text in texts if text is not None]
    beside = folder / CONFIG
    if beside.exists() and (path.is_dir() or not stored):
        return parse_json(beside.read_bytes(), str(beside))
    if len(stored) == 1:
        return parse_json(stored[0], f"{path}: `config` in the metadata")
    where = f"`config` in the metadata, as this library writes it, or {CONFIG} beside the weights"
    raise WeightsError(f"{path}: no config: expected {where}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open safetensors file; a damaged one, at any time, raises WeightsError."""
    from safetensors import SafetensorError, safe_open  # here, for `model` is imported where weights are never read

    _refuse_other_formats(file)
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        raise WeightsError(
            f"{file}: not a whole safetensors file ({_short(error)}); fetch or write it again"
        ) from error


def _refuse_other_formats(file: Path) -> None:
    if file.suffix == ".json":
        raise WeightsError(f"{file}: expected a safetensors file or a folder; give the folder this file is in")
    if not file.exists():
        raise WeightsError(f"{file}: no such file; expected a safetensors file or a folder of diffusers")
    if not file.is_file():
        raise WeightsError(f"{file}: expected a safetensors file or a folder, got a device or a pipe")
    with file.open("rb") as opened:
        start = opened.read(max(map(len, _OTHER_FORMATS)))
    found = next((_OTHER_FORMATS[magic] for magic in _OTHER_FORMATS if start.startswith(magic)), None)
    if found == "pickle" or (found is None and file.suffix in PICKLES):
        found = _PICKLE
    if found is not None:
        raise WeightsError(f"{file}: {found}")


def _describe(file: Path, reader: Any) -> Iterator[StoredTensor]:
    for name in reader.keys():  # noqa: SIM118 (safe_open is no mapping)
        view = reader.get_slice(name)
        yield StoredTensor(file, name, tuple(view.get_shape()), view.get_dtype())


def _refuse_adapter(path: Path, name: str) -> NoReturn:
    raise WeightsError(
        f"{path}: an adapter ({_short(name)}), not a whole model; merge it into its base model and give the result"
    )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # One pass without a temporary of the tensor's size; float8 has no such kernel.
    low, high = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return math.isfinite(low) and math.isfinite(high)


def _short(text: object) -> str:
    """Text of a file or of torch, which may be long and of many lines, for one line of a message."""
    line = (str(text).splitlines() or [""])[0]
    return line if len(line) <= MOST_QUOTED else f"{line[:MOST_QUOTED]}…"


def _place(tensor: StoredTensor) -> str:
    return f"{_short(tensor.name)} in {tensor.file.name}"


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _some(word: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(map(_short, ordered[:3])) + (", …" if len(ordered) > 3 else "")
    return f"{len(ordered)} {word}" + (f" ({shown})" if ordered else "")
