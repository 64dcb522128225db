"""NABLA's mask as the released pipeline builds it (diffusers' nablaT_v2), to time beside this library's.

The same operators in the same order, for machines without diffusers: a test compares the two. They work on the whole
map, N_b² numbers a head, sorted and sorted back.
"""

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

BLOCK = 64
DIFFUSERS = "diffusers.models.transformers.transformer_kandinsky"

# (counts int32 [B, h, N_b], key blocks int32 [B, h, N_b, N_b] of which a row's first `count` are kept)
Lists = tuple[Tensor, Tensor]


def released_mask() -> tuple[str, Callable[[Tensor, Tensor, Tensor, float], Lists]]:
    """Its name in the results, and the function: of q, k [B, S, h, D], a bool map of blocks to keep too, and thr."""
    if find_spec("diffusers") is None:
        return "nablaT_v2, its operators", operators

    def of_diffusers(q: Tensor, k: Tensor, sta: Tensor, thr: float) -> Lists:
        mask = import_module(DIFFUSERS).nablaT_v2(q, k, sta, thr)
        return mask.full_kv_num_blocks, mask.full_kv_indices

    return "diffusers nablaT_v2", of_diffusers


def operators(q: Tensor, k: Tensor, sta: Tensor, thr: float) -> Lists:
    """The mask by the operators of the released code."""
    means = [x.transpose(1, 2).contiguous().unflatten(2, (-1, BLOCK)).mean(3) for x in (q, k)]
    probabilities = torch.softmax(means[0] @ means[1].mT / math.sqrt(q.shape[-1]), dim=-1)
    values, order = probabilities.sort(-1)
    kept = (values.cumsum(-1) >= 1 - thr).int().gather(-1, order.argsort(-1))
    kept = torch.logical_or(kept, sta)
    return kept.sum(-1).to(torch.int32), kept.argsort(dim=-1, descending=True).to(torch.int32)


def kept_map(lists: Lists) -> Tensor:
    """Bool [B, h, N_b, N_b]."""
    counts, order = lists
    listed = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(listed).scatter(-1, order.long(), listed)
