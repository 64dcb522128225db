"""The figures that stand beside the nano weights, in one JSON file that the scripts which made them write."""

import json
from pathlib import Path
from typing import Any

from k5kernels.atomic import replacing


def record(path: Path, figures: dict[str, Any]) -> None:
    """Put the figures into the file, block by block; what they do not name stays, also within a block."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    for name, block in figures.items():
        settings[name] = settings.get(name, {}) | block if isinstance(block, dict) else block
    with replacing(path) as partial:
        partial.write_text(json.dumps(settings, indent=1) + "\n")
