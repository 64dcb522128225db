"""AdamW as the report trains with it (§6.3.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from k5kernels.device import device_of
from train.parallel import own_shard

EMBEDDINGS = ("time_embeddings", "text_embeddings", "pooled_text_embeddings", "visual_embeddings")  # of CrossDiT


class ShardedAdamW(torch.optim.AdamW):
    """AdamW that computes on this rank's shards; its state is of DTensors where the parameters are.

    A step takes every number by itself, so shards give what the whole would. On the DTensors PyTorch plans most
    operations anew in every step, as they are given numbers that change with it.
    """

    def _init_group(self, group: dict[str, Any], *tensors: list[Tensor]) -> bool:
        """Fill the lists that `step` computes on: parameters, gradients and states of those that have a gradient."""
        is_complex = super()._init_group(group, *tensors)
        for one in tensors:
            one[:] = map(own_shard, one)
        return is_complex


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> ShardedAdamW:
    """All parameters of the model; weight decay for matrices only, not for norms, biases and embeddings.

    On a GPU a step is one fused kernel. On a CPU PyTorch's plain loop needs no copies of the weights, as its `foreach`
    does.
    """
    return ShardedAdamW(
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
