"""AdamW as the report trains with it (§6.3.2)."""

import torch
from torch import nn

from k5kernels.device import device_of

EMBEDDINGS = ("time_embeddings", "text_embeddings", "pooled_text_embeddings", "visual_embeddings")  # of CrossDiT


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """All parameters of the model; weight decay for matrices only, not for norms, biases and embeddings.

    On a GPU a step is one fused kernel. On a CPU PyTorch's plain loop needs no copies of the weights, as its `foreach`
    does.
    """
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay),
        lr=learning_rate,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=device_of(model).type == "cuda" or None,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What decays, and what does not. The groups are the same at every weight decay, so that a run can go on with
    another one."""
    named = list(model.named_parameters())
    decays = [p.ndim > 1 and name.partition(".")[0] not in EMBEDDINGS for name, p in named]
    return [
        {"params": [p for (_, p), decay in zip(named, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for (_, p), decay in zip(named, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
