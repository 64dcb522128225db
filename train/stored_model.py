"""A CrossDiT to start from or to average: a weights file, a folder in diffusers' layout, or the folder of a run.

Of a run that has ended it is the weights that it has left, which are averages; of one that has not, the averages in its
newest whole checkpoint.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import complain
from k5kernels.weight_files import TRANSFORMER, StoredWeights, open_weights
from model.crossdit import CrossDiT
from model.weights import config_from_json
from train.checkpoint import MANIFEST, CheckpointError, Checkpoints, Saved
from train.loop import CHECKPOINTS
from train.parallel import ALONE, Parallel, fill_shard

WEIGHTS = "crossdit.safetensors"  # what a run leaves in its folder
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredModel(ABC):
    """tensors: names, shapes and dtypes of what is stored, on the device "meta"."""

    path: Path
    config: CrossDiTConfig
    tensors: Mapping[str, Tensor]

    @abstractmethod
    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor in float32) of all. Raises ValueError where what is stored is no such model."""

    @abstractmethod
    def fill(self, model: nn.Module) -> None:
        """Let the model's parameters, float32, take what is stored; of a sharded model each rank its shards, all ranks
        together. Raises as `read`."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of what is stored."""


def open_model(path: Path, raw: bool = False, parallel: Parallel = ALONE) -> StoredModel:
    """The model at the path; all ranks together. raw: of a run, the weights of its newest checkpoint, not averages.

    Raises ValueError (WeightsError, CheckpointError), one line, where there is none, OSError where it cannot be read.
    """
    if raw:
        return _of_checkpoint(path, "model.", parallel)
    if (path / WEIGHTS).is_file():
        return _of_weights(path / WEIGHTS)
    if (path / CHECKPOINTS).is_dir():
        return _of_checkpoint(path, "average.", parallel)
    return _of_weights(path)


@dataclass(frozen=True)
class _OfWeights(StoredModel):
    stored: StoredWeights

    def read(self) -> Iterator[tuple[str, Tensor]]:
        return self.stored.read({name: tensor.float() for name, tensor in self.tensors.items()})

    def fill(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, tensor in self.stored.read(parameters):
            fill_shard(parameters[name], tensor)

    def digest(self) -> str:
        return _digest(sorted({tensor.file for tensor in self.stored.tensors.values()}))


@dataclass(frozen=True)
class _OfCheckpoint(StoredModel):
    saved: Saved
    prefix: str  # of the names in the checkpoint
    group: ProcessGroup | None  # of those that read it

    def read(self) -> Iterator[tuple[str, Tensor]]:
        room = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in self.tensors.items()}
        self._read_into(room)
        return ((name, tensor.float()) for name, tensor in room.items())

    def fill(self, model: nn.Module) -> None:
        self._read_into({name: parameter.detach() for name, parameter in model.named_parameters()})

    def digest(self) -> str:
        return _digest([self.saved.path / MANIFEST])  # it holds the digests of all other files

    def _read_into(self, room: Mapping[str, Tensor]) -> None:
        self.saved.read_into({self.prefix + name: tensor for name, tensor in room.items()}, self.group)


def _of_weights(path: Path) -> StoredModel:
    stored = open_weights(path, TRANSFORMER)
    config = config_from_json(stored.config)
    stored.build(lambda: CrossDiT(config), config.text_blocks + config.visual_blocks)  # refuses what cannot be built
    tensors = {
        name: torch.empty(one.shape, dtype=DTYPES.get(one.dtype, torch.float32), device="meta")
        for name, one in stored.tensors.items()
    }
    return _OfWeights(path, config, tensors, stored)


def _of_checkpoint(run: Path, prefix: str, parallel: Parallel) -> StoredModel:
    checkpoints = Checkpoints(run / CHECKPOINTS, parallel=parallel)
    saved, refused = checkpoints.newest()
    if saved is None:
        raise ValueError(f"{run}: expected the folder of a run with a checkpoint, found none")
    if "model" not in saved.settings:
        raise CheckpointError(f"{saved.path}: expected the checkpoint of a CrossDiT, found another stage's")
    if parallel.first:
        for error in refused:
            complain(f"{error}; step {saved.done} is taken", "train")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in saved.tensors().items() if name.startswith(prefix)}
    return _OfCheckpoint(run, _config(saved.settings["model"]), tensors, saved, prefix, checkpoints.group)


def _config(stored: Mapping[str, Any]) -> CrossDiTConfig:
    """Of what JSON has made of it."""
    values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in stored.items()}
    return CrossDiTConfig(**values)


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"
