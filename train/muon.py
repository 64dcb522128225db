"""Muon for convolutions: each update is the momentum, with its filter matrix made nearly orthogonal.

`torch.optim.Muon` takes matrices only; a convolution's filters are one when everything but the output channel is
flattened. All directions of the matrix are then updated equally fast, also those with small gradients, such as an
autoencoder's colour.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

ITERATIONS = 5
# Quintic Newton-Schulz steps that take singular values in (0, 1] to near 1 (Jordan et al., Muon, 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor) -> Tensor:
    """The [rows, columns] matrix with all singular values brought to about 1 (0.7 to 1.2), in float32."""
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).float()


class ConvMuon(Optimizer):
    """Muon with Nesterov momentum; an update's root mean square is about 0.2 lr, as AdamW's is."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: no caller passes one
        """One update of every parameter that has a gradient; each has two or more dimensions."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                matrix = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = orthogonalize(matrix).view_as(parameter)
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def muon_and_adamw(model: nn.Module, muon_lr: float, adam_lr: float) -> dict[str, Optimizer]:
    """By name: Muon for the model's filters and matrices, AdamW without decay for its biases and norms."""
    filters = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    adamw = AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return {"muon": ConvMuon(filters, lr=muon_lr), "adamw": adamw}
