"""Checkpoints of single-process trainings: written whole or not at all, and checked before they are gone on from."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k5kernels.atomic import replacing

FORMAT = 1  # of the file; another one is another program's or another version's
FIXED = ("stage", "model", "init")  # settings that no checkpoint can go on with another value of


class CheckpointError(ValueError):
    """A file that no run can go on from, or not the one that was asked for; the message names it and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """done: steps behind it. settings: what the run was made with, as JSON. stage: `Stage.state_dict`, on the CPU."""

    done: int
    settings: Mapping[str, Any]
    stage: Mapping[str, Any]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Replace the file by the checkpoint; a kill or a full disk leaves the former one whole."""
    state = {"format": FORMAT, **vars(checkpoint)}
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # When a write fails, torch closes its archive and reports that this fails too.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in the file, or None where there is no file.

    Its tensors are mapped from the file, not copied. No pickled code is run. Raises CheckpointError where it is not a
    whole checkpoint; every byte is checked against the file's checksums, which torch.load does not do.
    """
    if not path.exists():
        return None
    _refuse_folder(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # zipfile raises errors of a dozen kinds on damaged archives
            raise _damaged(path, error) from error
    if damaged is not None:
        raise _damaged(path, f"{damaged} does not match its checksum")
    return _read(path)


def check_settings(path: Path, settings: Mapping[str, Any], allow_others: bool) -> None:
    """Raise CheckpointError, which names each difference, where the file's checkpoint has other settings.

    settings: those to compare; what else the checkpoint has is left for later. allow_others: go on with the new
    settings all the same, but for those of FIXED.
    """
    if path.exists():
        _refuse_folder(path)
        refuse_others(path, _read(path).settings, settings, allow_others)


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


def _read(path: Path) -> Checkpoint:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that no checkpoint has: it is refused, or whole all the same
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to run the code that the file holds.
        raise _damaged(path, "its pickle holds other things than a checkpoint's") from error
    except Exception as error:  # torch.load raises errors of as many kinds as zipfile
        raise _damaged(path, error) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this trainer (format {FORMAT}), found another program's or version's"
        )
    try:
        return Checkpoint(int(state["done"]), dict(state["settings"]), dict(state["stage"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint file, found a folder")


def _damaged(path: Path, reason: object) -> CheckpointError:
    lines = str(reason).splitlines() or [type(reason).__name__]
    return CheckpointError(f"{path}: expected a whole checkpoint, found a damaged or foreign file ({lines[0]})")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"attention": {"thr": 0.9}} to {"attention.thr": 0.9}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not set"
