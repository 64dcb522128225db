"""Checkpoints of single-process trainings: written whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from k5kernels.atomic import replacing


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace the file by the state; a kill leaves the former checkpoint whole."""
    with replacing(path) as partial:
        torch.save(state, partial)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that was saved, on the CPU, or None where there is no file. Tensors only, no pickled code."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
