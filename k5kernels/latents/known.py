"""Which of a job's sources are known from earlier runs: by path and content, in this part of the folder and the others.

A path alone says that a source is probably known. Whether it is, its content says; the sources that are new by their
path are encoded before those that are known are read again to compare them.
"""

from collections.abc import Iterable, Iterator

from k5kernels.latents.manifest import Manifest, SourceEntry


class Known:
    """own: the manifest of this part, which grows. others: those of the other parts, which are not followed.

    retry_failed: sources that failed by their content are open again.
    """

    def __init__(self, own: Manifest, others: Iterable[Manifest], retry_failed: bool) -> None:
        self._own, self._retry_failed = own, retry_failed
        self._numbers: dict[str, list[int]] = {}
        self._seen = 0
        self._elsewhere: dict[str, list[SourceEntry]] = {}
        for manifest in others:
            for entry in manifest.sources:
                self._elsewhere.setdefault(entry.source, []).append(entry)

    def is_open(self, entry: SourceEntry) -> bool:
        """Whether more may come of a source."""
        return not entry.whole or (self._retry_failed and entry.failure is not None)

    def is_new(self, path: str) -> bool:
        """Whether this part must take up a source of this path: it has none, and no other part has ended one."""
        return not self._own_entries(path) and all(self.is_open(entry) for entry in self._elsewhere.get(path, ()))

    def is_ended(self, path: str) -> bool:
        """Whether all sources of this path have ended, here or in another part."""
        entries = list(self._entries(path))
        return bool(entries) and not self.is_new(path) and not any(map(self.is_open, self._own_entries(path)))

    def find(self, path: str, sha256: str) -> SourceEntry | None:
        """The source of this path and content that came furthest."""
        same = [entry for entry in self._entries(path) if entry.sha256 == sha256]
        return max(same, key=lambda entry: (entry.whole, entry.failure is None), default=None)

    def number(self, path: str, sha256: str | None) -> int | None:
        """Number in this part's manifest of the source of this path and content, or of one whose content is open."""
        self._follow()
        numbers = self._numbers.get(path, [])
        for content in (sha256, None):
            for number in numbers:
                if self._own.sources[number].sha256 == content:
                    return number
        return None

    def clips(self, path: str, sha256: str) -> int:
        """How many of its clips are in shards."""
        return sum(entry.clips for entry in self._entries(path) if entry.sha256 == sha256)

    def _entries(self, path: str) -> Iterator[SourceEntry]:
        yield from self._own_entries(path)
        yield from self._elsewhere.get(path, ())

    def _own_entries(self, path: str) -> list[SourceEntry]:
        self._follow()
        return [self._own.sources[number] for number in self._numbers.get(path, ())]

    def _follow(self) -> None:
        """Take in what has arrived in the own manifest."""
        while self._seen < len(self._own.sources):
            self._numbers.setdefault(self._own.sources[self._seen].source, []).append(self._seen)
            self._seen += 1
