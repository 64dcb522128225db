"""A stage of training: what learns, from which data, by which loss and which optimizers. `train.loop` runs it.

A new kind of training is a new Stage; the loop stays as it is. Only parameters that an optimizer holds learn, and of
those only the ones the loss has reached: a stage that trains two networks in turn returns the loss of one of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from k5kernels.device import device_of
from train.parallel import own_shard


@dataclass(frozen=True)
class Loss:
    """value: scalar with a gradient. samples: what it was computed from, in words for an error message."""

    value: Tensor
    samples: Sequence[str]


class Average:
    """Running average (EMA) of a model's parameters, on their devices: of shards, where the model is sharded."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the parameters after step number `done`, counted from 0.

        The first steps decay faster, min(decay, (done + 1) / (done + 10)), so that the random start fades early.
        """
        decay = min(self.decay, (done + 1) / (done + 10))
        for name, parameter in self.model.named_parameters():
            own_shard(self.tensors[name]).lerp_(own_shard(parameter), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of a model of the same architecture with the averages."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.tensors[name])


class Stage(ABC):
    """What the loop needs to know of a training.

    settings: everything that decides the result, as JSON values; a checkpoint keeps it, and a run that goes on from
    the checkpoint must have the same. optimizers: by name, each made with its peak learning rates. device: the model's,
    which must be in its place before the stage is made.
    """

    def __init__(
        self, settings: Mapping[str, Any], model: nn.Module, optimizers: Mapping[str, Optimizer], ema_decay: float
    ) -> None:
        self.settings, self.model, self.optimizers = settings, model, optimizers
        self.average = Average(model, ema_decay)
        self.device = device_of(model)

    @abstractmethod
    def loss(self, step: int, generator: torch.Generator) -> Loss:
        """The loss of a step, counted from 0, on data drawn for it. generator: of the CPU; every draw comes from it,
        so that a step depends on the seed and its number alone, and not on the device or on an interruption."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by name, that a checkpoint keeps of the stage.

        The optimizers' hyperparameters are not among them: settings say them. Raises TypeError where an optimizer keeps
        other things than tensors.
        """
        state = self._own()
        for name, optimizer in self.optimizers.items():
            for index, kept in optimizer.state_dict()["state"].items():
                state |= {f"optimizers.{name}.{index}.{key}": value for key, value in kept.items()}
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        return state

    def room(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to read a `state_dict` into, this stage's own but for the optimizers': `take` gives them those.

        stored: names, shapes and dtypes of what will be read. Raises ValueError where it is another stage's.
        """
        room = self._own()
        if missing := room.keys() - stored.keys():
            raise ValueError(f"expected {min(missing)}, which it does not have")
        for name in stored.keys() - room.keys():
            room[name] = self._room_of_optimizer(name, stored[name])
        for name, tensor in room.items():
            if tensor.shape != stored[name].shape:
                raise ValueError(f"{name}: expected {list(tensor.shape)}, got {list(stored[name].shape)}")
        return room

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what was read into `room`. Raises ValueError where it holds infinities, NaN or negative steps."""
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.optimizers}
        for name in state.keys() - self._own().keys():
            _, optimizer_name, index, key = name.split(".")
            states[optimizer_name].setdefault(int(index), {})[key] = state[name]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict({"state": states[name], "param_groups": optimizer.state_dict()["param_groups"]})
        for name, tensor in state.items():
            here = own_shard(tensor)
            if not here.isfinite().all() or (name.endswith(".step") and (here < 0).any()):
                raise ValueError(f"{name}: expected finite numbers and steps from 0, got others")

    def _own(self) -> dict[str, Tensor]:
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return model | {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}

    def _room_of_optimizer(self, name: str, stored: Tensor) -> Tensor:
        match name.split("."):
            case ["optimizers", optimizer, index, _] if optimizer in self.optimizers and index.isdecimal():
                groups = self.optimizers[optimizer].param_groups
                parameters = [parameter for group in groups for parameter in group["params"]]
                if int(index) < len(parameters):
                    parameter = parameters[int(index)].detach()
                    scalar = stored.ndim == 0 and parameter.ndim > 0
                    return torch.zeros((), dtype=stored.dtype) if scalar else torch.zeros_like(parameter)
        raise ValueError(f"{name}: expected no such tensor")
