"""What is read of a source: which of the files of its path it is, and its clips. It runs in threads of `Ahead`."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from k5kernels.folder import is_url, local_copy
from k5kernels.latents.encode import Encoding
from k5kernels.latents.failures import ending, told
from k5kernels.latents.sources import Source, content_hash
from k5kernels.latents.video import Clip, VideoError


@dataclass
class End:
    """How the reading of a source ended. failure: its content's fault. passing: another one, so that it is tried again.
    Both are without the file, which may have another place the next time.
    """

    whole: bool = False
    failure: str | None = None
    passing: str | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """A file of the path that was looked at. sha256: of its content; None where it cannot be read, and why."""

    source: Source
    sha256: str | None
    why: str = ""


# What comes of a source: the files that were tried, of which the last may be the one, its clips, and how it ended.
Read = Tried | Clip | End


class SourceReader:
    """problems: file -> why it is not to be read."""

    def __init__(self, encoding: Encoding, problems: dict[str, str]) -> None:
        self._encoding, self._problems = encoding, problems
        self._tried: dict[str, Tried] = {}

    def read(self, files: list[Source], sha256: str | None) -> Iterator[Read]:
        """Of the files of one path the first of this content (None: of any), in clips."""
        for source in files:
            with self._at_hand(source) as (tried, local):
                yield tried
                if tried.sha256 is not None and sha256 in (None, tried.sha256):
                    end = End()
                    yield from self._clips(source, local, end)
                    yield end
                    return

    def try_file(self, source: Source) -> Tried:
        """Read once in a run. Raises OSError where what fails would fail for every source."""
        if source.file in self._tried:
            return self._tried[source.file]
        with self._at_hand(source) as (tried, _):
            return tried

    def clips(self, source: Source, end: End) -> Iterator[Clip]:
        """Whatever the source raises ends up in `end`, unless all would raise it."""
        with self._at_hand(source) as (tried, local):
            end.passing = tried.why or None
            if tried.sha256 is not None:
                yield from self._clips(source, local, end)

    @contextmanager
    def _at_hand(self, source: Source) -> Iterator[tuple[Tried, str]]:
        """(the file's hash, or why it has none, and its path), of a copy until the block ends where it is elsewhere."""
        with ExitStack() as stack:
            local = source.file
            try:
                local = stack.enter_context(local_copy(source.file))
                if source.file not in self._tried or is_url(source.file):
                    self._tried[source.file] = Tried(source, content_hash(local))
            except OSError as error:
                if ended := ending(error, source.file):
                    raise ended from error
                self._tried[source.file] = Tried(source, None, told(error))
            yield self._tried[source.file], local

    def _clips(self, source: Source, local: str, end: End) -> Iterator[Clip]:
        if source.file in self._problems:
            end.passing = f"its caption: {self._problems[source.file]}"
            return
        failure = None
        try:
            before = _stamp(local)
            try:
                yield from self._encoding.clips(local)
            except VideoError as error:
                failure = str(error).removeprefix(f"{local}: ")
            if _stamp(local) == before:
                end.whole, end.failure = True, failure
            else:
                end.passing = "was changed while it was read; run the command again"
        except Exception as error:
            if ended := ending(error, source.file):
                raise ended from error
            end.passing = told(error)


def frame_bytes(read: Read) -> int:
    """What it takes of memory while it waits."""
    return read.frames.numel() if isinstance(read, Clip) else 0


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
