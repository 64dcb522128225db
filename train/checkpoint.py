"""Checkpoints of a training, by one process or many: each a folder that is whole or not there.

    checkpoints/step-000100/            checkpoint.json: steps done, settings, size and SHA-256 of every other file
                                        .metadata: torch.distributed.checkpoint's index of all tensors
                                        __0_0.distcp: rank 0's shards, and so on
    checkpoints/step-000200.partial/    being written, or being removed; never read
    checkpoints/step-000150.damaged/    set aside by a run that went on from an older one

Every rank writes its shards from a thread, while training goes on. Rank 0 gives the folder its name when all of it is
on the disk. Any number of ranks can read it. All ranks must see the folder.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from k5kernels.atomic import flush_folder, replacing
from train.marked_files import FileMark, MarkedFiles, mark_of
from train.parallel import ALONE, Parallel
from train.ranks import everywhere, on_first

FORMAT = 2  # of the folder; another one is another program's or another version's
MANIFEST = "checkpoint.json"
INDEX = ".metadata"
STATE = "state"  # all tensors are below this name in the index: every name of the first level costs time
PARTIAL = ".partial"
DAMAGED = ".damaged"
KEEP = 2
WRITERS_NICENESS = 10
_NAME = re.compile(r"step-(\d{6,})")
# One process that saves alone is no accident here. The warning comes from a thread, where no block can silence it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
# All that an index is made of. What it names beside these is refused, not imported.
_INDEX_PARTS = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


class CheckpointError(ValueError):
    """A checkpoint that no run can go on from, or not the one that was asked for; the message names it and says why."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint in its folder. done: steps behind it. settings: what the run was made with, as JSON."""

    path: Path
    done: int
    settings: Mapping[str, Any]
    files: Mapping[str, FileMark]

    def check_files(self, first: int = 0, every: int = 1) -> None:
        """Read file number `first` and each `every`-th after it; raises CheckpointError where one is not as written."""
        for name in sorted(self.files)[first::every]:
            try:
                same = mark_of(self.path / name) == self.files[name]
            except OSError as error:
                raise _damaged(self.path, error) from error
            if not same:
                raise _damaged(self.path, f"{name} does not match its checksum")

    def tensors(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes of what it holds, as tensors on the device "meta"."""
        try:
            return {
                name.removeprefix(f"{STATE}."): torch.empty(one.size, dtype=one.properties.dtype, device="meta")
                for name, one in self._index().state_dict_metadata.items()
                if isinstance(one, TensorStorageMetadata)  # all are
            }
        except Exception as error:  # a damaged pickle raises whatever its content leads to
            raise _damaged(self.path, error) from error

    def read_into(self, tensors: dict[str, Tensor], group: ProcessGroup | None = None) -> None:
        """Fill the tensors, of DTensors this rank's part, with what the checkpoint holds under their names.

        All ranks together; group: of gloo, None for one process alone. No pickled code is run. Raises CheckpointError,
        on all ranks alike.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of formats that no checkpoint has: it is refused
                dcp.load(
                    {STATE: tensors},
                    storage_reader=_Reader(self.path, self._index()),
                    process_group=group,
                    no_dist=group is None,
                )
        except CheckpointException as error:
            raise _damaged(self.path, _cause(error)) from error
        except Exception as error:  # as above
            raise _damaged(self.path, error) from error

    def _index(self) -> Metadata:
        """The index of the tensors, a pickle, of which nothing is imported but what an index is made of."""
        data = io.BytesIO((self.path / INDEX).read_bytes())
        # No index has a bytearray, and the unpickler complains on stderr of one whose size is damaged.
        if any(opcode.name == "BYTEARRAY8" for opcode, _, _ in pickletools.genops(data.getvalue())):
            raise pickle.UnpicklingError("its index has other things than tensors")
        index = _IndexUnpickler(data).load()
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise pickle.UnpicklingError("its index is none")
        if not all(isinstance(one, TensorStorageMetadata) for one in index.state_dict_metadata.values()):
            raise pickle.UnpicklingError("its index has other things than tensors")
        if strangers := {part.relative_path for part in index.storage_data.values()} - self.files.keys():
            raise pickle.UnpicklingError(f"its index points to {min(strangers)!r}, which is no file of it")
        index.storage_meta = StorageMeta()
        return index


class Checkpoints:
    """The checkpoints in a folder. All ranks make it, and call its methods, together.

    keep: how many stay when a new one is whole; the newest do. parallel: the ranks, which need a folder that all see.
    """

    def __init__(self, folder: Path, keep: int = KEEP, parallel: Parallel = ALONE) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self.folder, self.keep, self.parallel = folder, keep, parallel
        self._saved = 0
        # Of its own: the thread that saves must not mix its messages with those of the training.
        self.group = parallel.host_group()
        self._pending: tuple[int, Future[Any]] | None = None

    def save(self, done: int, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, and begin to write the copies; returns when they are made.

        Waits for the save before this one, and raises what `wait` raises.
        """
        self.wait()
        future = dcp.async_save(
            {STATE: dict(tensors)},
            storage_writer=_Writer(self.folder / step_name(done), done, settings, self.keep),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)  # the writer makes the copies before async_save returns
        self._pending = done, future

    @property
    def saved(self) -> int:
        """Steps behind the newest checkpoint that was written here and is whole, 0 before the first."""
        whole = self._pending is not None and self._pending[1].done() and not self.failed
        return self._pending[0] if whole and self._pending is not None else self._saved

    @property
    def failed(self) -> bool:
        """Whether a save has ended with the error that `wait` raises."""
        return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None

    def wait(self) -> None:
        """Return when the save that was begun is on the disk under its name.

        Raises OSError, which names the checkpoint, on all ranks where one of them cannot write; torch's RuntimeError
        where a rank is gone. Former checkpoints stay.
        """
        if self._pending is None:
            return
        (done, future), self._pending = self._pending, None
        path = self.folder / step_name(done)
        try:
            future.result()
        except CheckpointException as error:
            if self.parallel.first:
                shutil.rmtree(_partial(path), ignore_errors=True)  # the first error is the one to tell
            cause = _cause(error)
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise OSError(f"{path}: not written ({_first_line(cause)})") from error
        self._saved = done

    def newest(self) -> tuple[Saved | None, list[CheckpointError]]:
        """The newest checkpoint that is whole, every byte checked, and for each newer one why it is not.

        None where there is none at all. Raises CheckpointError where there are some, and none is whole.
        """
        refused: list[CheckpointError] = []
        for path in on_first(lambda: _steps(self.folder), self.group):
            try:
                return self._whole(path), refused
            except CheckpointError as error:
                refused.append(error)
        if refused:
            raise CheckpointError(f"{refused[0]}, and there is no older one to go on from; train into another folder")
        return None, refused

    def remove_partial(self) -> None:
        """Remove what killed runs left half written. Only for who alone writes to the folder."""

        def remove() -> None:
            for path in self.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(path)

        on_first(remove, self.group)

    def set_aside_after(self, done: int) -> None:
        """Rename the checkpoints of later steps, which are damaged, so that none is taken for one of this run."""

        def rename() -> None:
            for path in _steps(self.folder):
                if _number(path) > done:
                    aside = path.with_name(path.name + DAMAGED)
                    shutil.rmtree(aside, ignore_errors=True)  # from an earlier fall back to an older one
                    path.replace(aside)

        on_first(rename, self.group)

    def _whole(self, path: Path) -> Saved:
        saved = on_first(lambda: _read_manifest(path), self.group)
        everywhere(lambda: saved.check_files(self.parallel.rank, self.parallel.world), self.group)
        return saved


def step_name(done: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{done:06d}"


def newest_description(folder: Path) -> Saved | None:
    """The newest checkpoint whose description can be read, its files unchecked; None where there is no checkpoint.

    Raises CheckpointError where there are some, and none can be read.
    """
    refused: list[CheckpointError] = []
    for path in _steps(folder):
        try:
            return _read_manifest(path)
        except CheckpointError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return None


@dataclass(frozen=True)
class _MarkedResult(WriteResult):
    """Where a tensor was written, and the mark of that file."""

    mark: FileMark


class _Writer(FileSystemWriter):
    """Writes beside the checkpoint's name; rank 0 gives the name when all ranks have written, and removes old ones."""

    def __init__(self, path: Path, done: int, settings: Mapping[str, Any], keep: int) -> None:
        # Nothing is copied ahead: what is written is in host memory. Its files see that they are on the disk.
        super().__init__(_partial(path), sync_files=False, per_thread_copy_ahead=0)
        self.final, self.done, self.settings, self.keep = path, done, settings, keep
        self.fs = self.files = MarkedFiles()

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """One copy of each tensor in host memory; torch's own stager makes two of a DTensor."""
        return {
            STATE: {
                name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
                for name, tensor in state_dict[STATE].items()
            }
        }

    def storage_meta(self) -> StorageMeta | None:
        """None: a checkpoint can be moved, so it does not say where it was written."""
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **settings: Any) -> None:
        """The first of what the saving thread does."""
        _give_way()
        torch.serialization.set_crc32_options(False)  # of this thread; `load` checks none, and SHA-256 all
        super().set_up_storage_writer(is_coordinator, *arguments, **settings)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing: rank 0 makes the folder, before any rank writes."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0 alone."""
        if self.final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.final))
        if _partial(self.final).exists():
            shutil.rmtree(_partial(self.final))
        _partial(self.final).mkdir(parents=True)
        flush_folder(self.final.parent.parent)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this rank's shards; they are on the disk when this returns."""
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:
            # When a write fails, torch closes its archive and reports that this fails too.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        marks = self.files.marks
        marked: TorchFuture[list[WriteResult]] = TorchFuture()
        marked.set_result(
            [_MarkedResult(**vars(result), mark=marks[result.storage_data.relative_path]) for result in results]
        )
        return marked

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0 alone, when all ranks have written."""
        super().finish(metadata, results)
        partial = _partial(self.final)
        files = {
            result.storage_data.relative_path: result.mark
            for written in results
            for result in written
            if isinstance(result, _MarkedResult)
        }
        _write_manifest(partial, self.done, self.settings, files | {INDEX: mark_of(partial / INDEX)})
        flush_folder(partial)
        os.replace(partial, self.final)
        flush_folder(self.final.parent)
        for path in _steps(self.final.parent)[self.keep :]:
            os.replace(path, _partial(path))  # a kill in between leaves no half of a checkpoint
            shutil.rmtree(_partial(path), ignore_errors=True)  # or at the next start


class _Reader(FileSystemReader):
    """Reads by an index that has been read and checked."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *arguments: Any, **settings: Any) -> Metadata:
        return self.index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_PARTS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"its index holds {module}.{name}, which no index does")


def _give_way() -> None:
    """Let this thread have a core where the training leaves one; where it leaves none, a small share.

    Small, not none: the next checkpoint waits for this one, and a training that was told to end does.
    """
    if sys.platform == "linux":  # where threads have a priority each
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(WRITERS_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def _steps(folder: Path) -> list[Path]:
    """The folders of checkpoints, the newest first."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder of checkpoints, found a file")
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _write_manifest(path: Path, done: int, settings: Mapping[str, Any], files: Mapping[str, FileMark]) -> None:
    marks = {name: asdict(mark) for name, mark in files.items()}
    content = {"format": FORMAT, "done": done, "settings": settings, "files": marks}
    with replacing(path / MANIFEST) as partial:
        partial.write_text(json.dumps({"sha256": _digest(content), **content}, indent=1))


def _read_manifest(path: Path) -> Saved:
    """Raises CheckpointError where a checkpoint's description is damaged, or another program's or version's."""
    try:
        content = dict(json.loads((path / MANIFEST).read_bytes()))
        if content.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{path}: expected a checkpoint of this trainer (format {FORMAT}), found another program's or version's"
            )
        if content.pop("sha256", None) != _digest(content):
            raise ValueError(f"{MANIFEST} does not match its checksum")
        files = {name: FileMark(int(mark["bytes"]), str(mark["sha256"])) for name, mark in content["files"].items()}
        if INDEX not in files or any(Path(name).name != name for name in files):
            raise ValueError("expected files of its folder")
        return Saved(path, _count(content["done"]), dict(content["settings"]), files)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"done: expected a number of steps, got {value!r}")
    return value


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cause(error: CheckpointException) -> BaseException:
    """What the first rank that failed raised."""
    return error.failures[min(error.failures)][0]


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected a whole checkpoint, found a damaged or foreign one ({_first_line(reason)})"
    )


def _first_line(reason: object) -> str:
    return next(iter(str(reason).splitlines()), type(reason).__name__)
