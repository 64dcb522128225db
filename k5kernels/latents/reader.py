"""What is read of a source: which of the files of its path it is, and its clips. It runs in threads of `Ahead`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

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
        self._hashes: dict[str, Tried] = {}

    def read(self, files: list[Source], sha256: str | None) -> Iterator[Read]:
        """Of the files of one path the first of this content (None: of any), in clips."""
        for source in files:
            tried = self.try_file(source)
            yield tried
            if tried.sha256 is not None and sha256 in (None, tried.sha256):
                end = End()
                yield from self.clips(source, end)
                yield end
                return

    def try_file(self, source: Source) -> Tried:
        """Read once in a run. Raises OSError where what fails would fail for every source."""
        if source.file not in self._hashes:
            try:
                self._hashes[source.file] = Tried(source, content_hash(source.file))
            except OSError as error:
                if ended := ending(error, source.file):
                    raise ended from error
                self._hashes[source.file] = Tried(source, None, told(error))
        return self._hashes[source.file]

    def clips(self, source: Source, end: End) -> Iterator[Clip]:
        """Whatever the source raises ends up in `end`, unless all would raise it."""
        if source.file in self._problems:
            end.passing = f"its caption: {self._problems[source.file]}"
            return
        failure = None
        try:
            before = _stamp(source.file)
            try:
                yield from self._encoding.clips(source)
            except VideoError as error:
                failure = str(error).removeprefix(f"{source.file}: ")
            if _stamp(source.file) == before:
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
