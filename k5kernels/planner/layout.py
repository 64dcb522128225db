"""How a training step is laid out over GPUs."""

from dataclasses import dataclass
from typing import Any

from k5kernels.planner.checks import positive_integer


@dataclass(frozen=True)
class Layout:
    """Shards × replicas GPUs (HSDP), in groups of `sequence_parallel` that share every clip.

    micro_batch: clips of one forward of a group. accumulation: forwards of an optimizer step. checkpointing: of every
    block. offload: block inputs go to host memory between forward and backward; it needs checkpointing.
    `search` fills the fields with numpy arrays of one length, one element a layout; the properties serve both.
    """

    shards: Any = 1
    replicas: Any = 1
    sequence_parallel: Any = 1
    micro_batch: Any = 1
    accumulation: Any = 1
    checkpointing: Any = True
    offload: Any = False

    @property
    def gpus(self) -> Any:
        """All GPUs."""
        return self.shards * self.replicas

    @property
    def groups(self) -> Any:
        """Groups of GPUs that work on clips of their own."""
        return self.gpus // self.sequence_parallel

    @property
    def batch(self) -> Any:
        """Clips of an optimizer step."""
        return self.micro_batch * self.accumulation * self.groups

    def __str__(self) -> str:
        words = [f"{self.gpus} GPUs = {self.shards} shards × {self.replicas} replicas", f"SP {self.sequence_parallel}"]
        words.append(f"micro-batch {self.micro_batch} × {self.groups} groups × {self.accumulation} accumulation")
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        return ", ".join([*words, f"{kept} with offload" if self.offload else kept])


def checked(layout: Layout) -> Layout:
    """The layout. Raises ValueError that names the field where a number is not a positive integer, or a switch no
    bool.
    """
    for field in ("shards", "replicas", "sequence_parallel", "micro_batch", "accumulation"):
        positive_integer(field, getattr(layout, field))
    for field in ("checkpointing", "offload"):
        if not isinstance(getattr(layout, field), bool):
            raise ValueError(f"{field}: expected True or False, got {getattr(layout, field)!r}")
    if layout.offload and not layout.checkpointing:
        raise ValueError("offload: expected False without checkpointing, which keeps no block inputs; got True")
    return layout
