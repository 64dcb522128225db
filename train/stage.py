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


@dataclass(frozen=True)
class Loss:
    """value: scalar with a gradient. samples: what it was computed from, in words for an error message."""

    value: Tensor
    samples: Sequence[str]


class Average:
    """Running average (EMA) of a model's parameters, on their devices."""

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
            self.tensors[name].lerp_(parameter, 1 - decay)

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

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the stage. The optimizers' hyperparameters are not in it: settings say them."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.tensors,
            "optimizers": {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a `state_dict`, from whatever device, into this stage's tensors.

        Raises KeyError, RuntimeError or ValueError where it is another stage's, or holds infinities or NaN.
        """
        self.model.load_state_dict(state["model"])
        for name, average in self.average.tensors.items():
            average.copy_(state["average"][name])
        for name, optimizer in self.optimizers.items():
            # An optimizer keeps the tensors it is given; these may be a file's.
            own = {
                index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()}
                for index, entries in state["optimizers"][name].items()
            }
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
            _check_state(name, optimizer)
        for name, tensor in (*self.model.state_dict().items(), *self.average.tensors.items()):
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got inf or nan")


def _check_state(name: str, optimizer: Optimizer) -> None:
    """What an optimizer keeps of a parameter: finite, and of its shape or a scalar."""
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if not isinstance(value, Tensor) or value.shape not in (parameter.shape, ()):
                raise ValueError(f"{name}: expected {key} as a tensor {list(parameter.shape)} or a scalar")
            if not value.isfinite().all() or (key == "step" and value < 0):
                raise ValueError(f"{name}: expected {key} of finite numbers and steps from 0, got others")
