"""Whether a run may go on from a checkpoint: with the same settings it may, with others only where it is told to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checkpoint import CheckpointError, newest_description
from train.parallel import ALONE, Parallel
from train.ranks import on_first

FIXED = ("stage", "model", "init")  # that no checkpoint can go on with another value of


def check_settings(folder: Path, settings: Mapping[str, Any], allow_others: bool, parallel: Parallel = ALONE) -> None:
    """Raise CheckpointError, which names each difference, where the folder's newest checkpoint has other settings.

    settings: those to compare; what else the checkpoint has is left for later. allow_others: go on with the new
    settings all the same, but for those of FIXED. All ranks together.
    """

    def check() -> None:
        saved = newest_description(folder)
        if saved is not None:
            refuse_others(saved.path, saved.settings, settings, allow_others)

    on_first(check, parallel.group)


def refuse_others(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any], allow_others: bool) -> None:
    """As `check_settings`, for settings that have been read."""
    before = _flat({name: value for name, value in stored.items() if name in settings})
    now = _flat(json.loads(json.dumps(settings)))
    differences = {
        name: f"{name} {_shown(before, name)} (now {_shown(now, name)})"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    }
    fixed = [words for name, words in differences.items() if name.partition(".")[0] in FIXED]
    if fixed:
        raise CheckpointError(f"{path}: another model's checkpoint: {', '.join(fixed)}; train into another folder")
    if differences and not allow_others:
        raise CheckpointError(
            f"{path}: made with other settings: {', '.join(differences.values())}; give those, train into another "
            "folder, or go on with the new ones by --set-on-resume"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"attention": {"thr": 0.9}} to {"attention.thr": 0.9}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not set"
