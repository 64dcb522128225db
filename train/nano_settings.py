"""settings.json beside the nano weights: the figures of the scripts that made the weights, written by these scripts."""

import json
from pathlib import Path
from typing import Any

from k5kernels.atomic import replacing


def record(path: Path, figures: dict[str, Any]) -> None:
    """Merge the figures into the file. Entries that they do not name stay, also inside a block."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    for name, block in figures.items():
        settings[name] = settings.get(name, {}) | block if isinstance(block, dict) else block
    with replacing(path) as partial:
        partial.write_text(json.dumps(settings, indent=1) + "\n")
