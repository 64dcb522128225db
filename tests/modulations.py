"""Modulations of every kind, for the tests of the operators that take one."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from k5kernels import TokenLayout

PER = ["sample", "clip", "token"]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def layout_of(lengths: Sequence[int]) -> TokenLayout:
    """A layout whose clips have these numbers of tokens."""
    return TokenLayout([(length, 1, 1) for length in lengths])


def modulation_shape(per: str, B: int, lengths: Sequence[int], d: int) -> tuple[int, ...]:
    """The shape of a modulation with a row for each sample, clip or token of B sequences of such clips."""
    return {"sample": (B, d), "clip": (B * len(lengths), d), "token": (B, sum(lengths), d)}[per]


def layout_for(per: str, lengths: Sequence[int]) -> TokenLayout | None:
    """The layout that the public function must be given."""
    return layout_of(lengths) if per == "clip" else None


def clip_starts_for(per: str, lengths: Sequence[int]) -> list[int]:
    """The clip_starts that the operator and the reference must be given."""
    return list(layout_of(lengths).clip_tokens) if per == "clip" else [0, sum(lengths)]


def per_token(modulation: Tensor, per: str, B: int, lengths: Sequence[int]) -> Tensor:
    """The modulation copied to one row a token."""
    if per == "token":
        return modulation
    rows = modulation.view(B, -1, modulation.shape[-1])
    counts = torch.tensor(lengths if per == "clip" else [sum(lengths)], device=rows.device)
    return rows.repeat_interleave(counts, dim=1)
