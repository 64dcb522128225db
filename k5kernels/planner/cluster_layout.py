"""How a training step is laid out over the GPUs of a cluster: one layout, or the many that a search looks at."""

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from k5kernels.planner.checks import positive_integer, switch

Count = TypeVar("Count", int, NDArray[np.int64])
Switch = TypeVar("Switch", bool, NDArray[np.bool_])


@dataclass(frozen=True)
class LayoutFields(Generic[Count, Switch]):
    """Shards × replicas GPUs (HSDP), in groups of `sequence_parallel` that share every clip.

    micro_batch: clips of one forward of a group. accumulation: forwards of an optimizer step. checkpointing: every
    block is recomputed in the backward. offload: block inputs go to host memory between forward and backward, which
    needs checkpointing.
    """

    shards: Count
    replicas: Count
    sequence_parallel: Count
    micro_batch: Count
    accumulation: Count
    checkpointing: Switch
    offload: Switch

    @property
    def gpus(self) -> Count:
        """All GPUs."""
        return self.shards * self.replicas

    @property
    def groups(self) -> Count:
        """Groups of GPUs that work on clips of their own."""
        return self.gpus // self.sequence_parallel

    @property
    def batch(self) -> Count:
        """Clips of an optimizer step."""
        return self.micro_batch * self.accumulation * self.groups


@dataclass(frozen=True)
class ClusterLayout(LayoutFields[int, bool]):
    """One layout; the fields are those of `LayoutFields`. `checked` refuses one that is out of range."""

    shards: int = 1
    replicas: int = 1
    sequence_parallel: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    offload: bool = False

    def __str__(self) -> str:
        words = [f"{self.gpus} GPUs = {self.shards} shards × {self.replicas} replicas", f"SP {self.sequence_parallel}"]
        words.append(f"micro-batch {self.micro_batch} × {self.groups} groups × {self.accumulation} accumulation")
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        return ", ".join([*words, f"{kept} with offload" if self.offload else kept])


@dataclass(frozen=True)
class ClusterLayouts(LayoutFields[NDArray[np.int64], NDArray[np.bool_]]):
    """Many layouts: every field is an array [n] with one element a layout."""

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> ClusterLayout:
        return ClusterLayout(**{field.name: getattr(self, field.name)[index].item() for field in fields(self)})

    def select(self, chosen: NDArray) -> "ClusterLayouts":
        """Those that a mask or an array of indices chooses."""
        return ClusterLayouts(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


AnyLayout = ClusterLayout | ClusterLayouts


def checked(layout: ClusterLayout) -> ClusterLayout:
    """The layout. Raises ValueError that names the field where a count is not a positive integer, a switch is not a
    bool, or block inputs are offloaded that are not kept.
    """
    for field in ("shards", "replicas", "sequence_parallel", "micro_batch", "accumulation"):
        positive_integer(field, getattr(layout, field))
    for field in ("checkpointing", "offload"):
        switch(field, getattr(layout, field))
    positive_integer("shards × replicas", layout.gpus)
    if layout.groups:
        positive_integer("clips of a step", layout.batch)
    if layout.offload and not layout.checkpointing:
        raise ValueError("offload: expected False without checkpointing, which keeps no block inputs; got True")
    return layout
