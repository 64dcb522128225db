"""What ranks with shards of a model are to have as one process has it; a module that each of them can load."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tiny_stage import TINY
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.train_equality import NABLA, ODD, encode_text, latents, model
from k5kernels.offload import ActivationOffload
from k5kernels.offload.disk import DiskStore
from model.crossdit import CrossDiT
from train.building import build_model
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.loop import Loop
from train.optimizer import adamw
from train.parallel import ALONE, Parallel, own_shard, processes, shard_model, whole_state
from train.schedule import Schedule
from train.stored_model import open_model

CPU = torch.device("cpu")
Mesh = tuple[int, int, int]


def built(folder: Path, meshes: list[Mesh], sources: list[str]) -> list[tuple[Mesh, str, bool]]:
    """For each mesh, of random weights and of each source: whether the model is, bit for bit, that of one process."""
    rows = []
    for number, mesh in enumerate(meshes):
        with processes(CPU, *mesh, where=f"file://{folder}/{number}") as parallel:
            for source in ("", *sources):
                start = open_model(Path(source), parallel=parallel) if source else None
                state = whole_state(build_model(TINY, start, 5, parallel))
                torch.manual_seed(5)
                one = dict(open_model(Path(source)).read()) if source else CrossDiT(TINY).state_dict()
                equal = not parallel.first or (
                    state.keys() == one.keys() and all(torch.equal(state[name], one[name]) for name in one)
                )
                rows.append((mesh, source, equal))
    return rows


def stepped(folder: Path) -> tuple[bool, list[str]]:
    """Of AdamW on shards: whether it ends with the weights of one process, and its operations on DTensors."""
    operations = DTensorOperations()
    with processes(CPU, where=f"file://{folder}/store") as parallel:
        state = whole_state(_step(build_model(TINY, None, 0, parallel), operations))
    one = _step(build_model(TINY, None, 0, ALONE), operations).state_dict()
    return all(torch.equal(state[name], one[name]) for name in state), operations.names


def _step(model: CrossDiT, operations: "DTensorOperations") -> CrossDiT:
    optimizer = adamw(model, 0.1, weight_decay=0.1)
    for number in range(3):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * (number - 1.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (number + 1)
        with operations if number else nullcontext():  # the first step makes the states
            optimizer.step()
    return model


class DTensorOperations(TorchDispatchMode):
    """names: of the operations in the `with` block that are given a DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def offloaded(folder: Path, meshes: list[Mesh]) -> list[tuple[Mesh, bool, int]]:
    """For each mesh: whether gradients with offload are, bit for bit, those without, and how many tensors were away."""
    rows = []
    put, away = DiskStore.put, []
    DiskStore.put = lambda store, tensor: away.append(tensor.shape) or put(store, tensor)
    for number, mesh in enumerate(meshes):
        with processes(CPU, *mesh, where=f"file://{folder}/{number}") as parallel:
            kept = _gradients(parallel, None)
            away.clear()
            gradients = _gradients(parallel, ActivationOffload(folder, min_bytes=1))
            equal = all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
            rows.append((mesh, parallel.all_agree(equal), len(away)))
    return rows


def _gradients(parallel: Parallel, offload: ActivationOffload | None) -> list[Tensor]:
    made = shard_model(model(), parallel)
    made.offload = offload
    config = FlowMatching(batch=4, attention=NABLA)
    loop = Loop(CrossDiTStage(made, latents(ODD), encode_text, config, parallel=parallel), Schedule(1), parallel)
    loop.backward()
    return [own_shard(p.grad) for p in made.parameters() if p.grad is not None]
