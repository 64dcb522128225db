"""The parts of a folder: what each process of a job that is shared writes, under names of its own.

A job of one process has the names `manifest.json`, `00000.tar`, …; process 3 of several `0003-manifest.json`,
`0003-00000.tar`, …. Every process reads what the others have done, and writes only its own part.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from k5kernels.folder import Folder
from k5kernels.latents.journal import CHANGE, MANIFEST, Journal, change_name, change_numbers
from k5kernels.latents.manifest import Manifest, OldManifestError
from k5kernels.lock import Holder, is_held, locked, read_holder, this_process

PREFIX = r"(|\d{4}-)"
MANIFEST_NAME = re.compile(PREFIX + re.escape(MANIFEST))
LOCK_NAME = re.compile(PREFIX + r"encode\.lock")
CHANGE_NAME = re.compile(PREFIX + CHANGE.pattern)
SHARD_NAME = re.compile(PREFIX + r"(\d{5,})\.tar")
PARTIAL_NAME = re.compile(PREFIX + r"(\d{5,}\.tar|manifest(\.change\d{8})?\.json|encode\.lock)\.partial")


class JobError(ValueError):
    """A folder that this job cannot write to: it is another's; the message names the difference."""


def prefix_of(index: int, of: int) -> str:
    return f"{index:04d}-" if of > 1 else ""


def lock_name(prefix: str) -> str:
    return f"{prefix}encode.lock"


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}{number:05d}.tar"


def job_id(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_part(folder: Folder, own: Holder, prefix: str, settings: dict[str, Any], overwrite: bool) -> "Part":
    """The part of this prefix, of which the lock is held by `own`, and what is there of the others.

    overwrite: parts of another job are deleted. What is left of a process that was killed is removed.
    Raises JobError where the folder is another job's, where the job is shared otherwise at this moment, or where it
    holds more than its manifest knows; ManifestError where a manifest is damaged, OSError where the folder cannot be
    read.
    """
    names = folder.sizes()
    _check_locks(folder, names, own, prefix)
    patterns = (MANIFEST_NAME, CHANGE_NAME, SHARD_NAME)
    prefixes = {match[1] for name in names for pattern in patterns if (match := pattern.fullmatch(name))}
    journals: dict[str, Journal] = {}
    for part in sorted(prefixes):
        journal, difference = _load(folder, part, settings)
        if difference and not overwrite:
            raise JobError(
                f"{folder.out}: belongs to another job ({difference}); give another folder, "
                "or --overwrite to delete what is in it"
            )
        if difference and part == prefix:
            _delete(folder, part, names)
        elif difference:
            with locked(folder, lock_name(part), this_process(own.job, own.parts)):
                _delete(folder, part, names)
        elif journal is not None:
            journals[part] = journal
        else:
            others = (CHANGE_NAME, SHARD_NAME)
            found = min(n for n in names for other in others if (match := other.fullmatch(n)) and match[1] == part)
            raise JobError(f"{folder.out}: expected an empty folder or one with {part}{MANIFEST}, found only {found}")
    names = folder.sizes()
    for name in sorted(names):
        if (match := PARTIAL_NAME.fullmatch(name)) and match[1] == prefix:
            folder.remove(name)
    journal = journals.pop(prefix, None) or Journal(folder, prefix, Manifest(settings))
    _check_shards(folder, prefix, len(journal.manifest.shards), names)
    return Part(folder, prefix, journal, [other.manifest for other in journals.values()], names)


class Part:
    """What one process writes, and reads of the others.

    journal: its own manifest. others: manifests of the other parts. names: files of the folder at the start, and their
    sizes.
    """

    def __init__(
        self, folder: Folder, prefix: str, journal: Journal, others: list[Manifest], names: dict[str, int]
    ) -> None:
        self.folder, self.prefix, self.journal, self.others, self.names = folder, prefix, journal, others, names

    @property
    def manifest(self) -> Manifest:
        return self.journal.manifest

    def shard_path(self, number: int) -> str:
        return self.folder.path(shard_name(self.prefix, number))

    def next_shard(self) -> str | None:
        """Path of a shard that is there and not in the manifest: its writer was stopped between the two."""
        number = len(self.manifest.shards)
        return self.shard_path(number) if self.is_there(number) else None

    def bytes_there(self, number: int) -> int:
        """Size of the file of this shard's name at the start."""
        return self.names[shard_name(self.prefix, number)]

    def damaged_shards(self) -> list[int]:
        """Numbers of the shards that are missing, or not of the size they had."""
        shards = enumerate(self.manifest.shards)
        return [n for n, shard in shards if self.names.get(shard_name(self.prefix, n)) != shard.bytes]

    def is_there(self, number: int) -> bool:
        """Whether there was a file of this shard's name at the start."""
        return shard_name(self.prefix, number) in self.names


def _check_shards(folder: Folder, prefix: str, known: int, names: Iterable[str]) -> None:
    """A run that was stopped leaves at most one shard that its manifest does not know, the next one."""
    matches = (SHARD_NAME.fullmatch(name) for name in names)
    beyond = [int(match[2]) for match in matches if match and match[1] == prefix and int(match[2]) > known]
    if beyond:
        there = shard_name(prefix, min(beyond))
        raise JobError(
            f"{folder.path(prefix + MANIFEST)}: knows {known} shards, but {there} is there too; "
            "put the manifest of this folder back, or give another folder and encode anew"
        )


def _load(folder: Folder, prefix: str, settings: dict[str, Any]) -> tuple[Journal | None, str | None]:
    """(what is there, how its job differs from these settings)."""
    try:
        journal = Journal.load(folder, prefix)
    except OldManifestError as error:
        return None, str(error)
    return journal, _difference(journal.manifest.settings, settings) if journal else None


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return ", ".join(_describe(name, there.get(name), here.get(name)) for name in differing) or None


def _describe(name: str, there: Any, here: Any) -> str:
    if name == "encoder":
        return "another encoder: other weights or precision"
    if name == "text_encoder":
        return "captions encoded by another text encoder, or by none"
    return f"{name} {there} there, {here} now"


def _check_locks(folder: Folder, names: Iterable[str], own: Holder, prefix: str) -> None:
    """The locks of the other parts must be of this job, shared among as many processes."""
    for name in names:
        match = LOCK_NAME.fullmatch(name)
        if not match or match[1] == prefix:
            continue
        holder = read_holder(folder, name)
        if holder is None or (holder.job, holder.parts) == (own.job, own.parts) or not is_held(folder, name, holder):
            continue
        difference = (
            "another job" if holder.job != own.job else f"this job shared among {holder.parts}, not {own.parts}"
        )
        raise JobError(f"{folder.out}: is being written by {holder}: {difference}; wait for its end, or give another")


def _delete(folder: Folder, prefix: str, names: dict[str, int]) -> None:
    """Remove a part, its manifest last: whatever stops this, the next run still knows whose the rest is."""
    shards = [name for name in names if (match := SHARD_NAME.fullmatch(name)) and match[1] == prefix]
    changes = [change_name(prefix, number) for number in change_numbers(prefix, names)]
    for name in (*shards, *changes, f"{prefix}{MANIFEST}"):
        folder.remove(name)
