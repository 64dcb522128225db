"""Samples to the shards of one part of a folder, and what they were made from to its manifest.

The order makes a job safe: a shard is on the disk before its name is, its name before the manifest knows it, and a
source has ended in the manifest only when all its clips are in shards.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

from k5kernels.latents.known import Known
from k5kernels.latents.manifest import Change, Outcome, Piece, ShardEntry, SourceEntry
from k5kernels.latents.parts import JobError, Part
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample, ShardError, ShardWriter, read_shard
from k5kernels.lock import Lock

# So many sources that gave no clips, and so no shard, are written to the manifest together.
OUTCOMES_TOGETHER = 64


class PartWriter:
    """Collects samples and writes a shard whenever there are enough of them."""

    def __init__(self, part: Part, lock: Lock, known: Known, samples_per_shard: int) -> None:
        self.part, self.lock, self.known, self.samples_per_shard = part, lock, known, samples_per_shard
        # (source, clip, sample) in order; None holds the place of a picture that is not encoded yet.
        self._samples: list[tuple[int, int, Sample | None]] = []
        self._outcomes: list[Outcome] = []

    def adopt(self) -> None:
        """Take in a shard that a stopped run has finished without telling the manifest.

        Raises JobError where it is not of this job, or no shard.
        """
        path = self.part.next_shard()
        if path is None:
            return
        clips: list[tuple[int, int]] = []
        outcomes: dict[int, Outcome] = {}
        for record in self._records(path):
            source, sha256 = record.source, record.source_sha256
            number = None if sha256 is None else self.known.number(source, sha256)
            if number is None or sha256 is None:
                raise JobError(
                    f"{path}: expected a shard of this job, found one of {source}; move it to another folder"
                )
            first = self.known.clips(source, sha256) + sum(before == number for before, _ in clips)
            clips.append((number, first))
            outcomes[number] = Outcome(number, sha256, whole=False)
        next_number = len(self.part.manifest.shards)
        shard = ShardEntry(self.part.bytes_there(next_number), _pieces(clips))
        self._commit(Change(shards=((next_number, shard),), outcomes=tuple(outcomes.values())))

    def adopt_again(self, number: int) -> bool:
        """Take in a shard of another size than the manifest has for it, as a run leaves that was stopped when it had
        just made the shard again. Whether it was one: a missing shard and a damaged one are not.

        Raises JobError where it is whole, but of other clips.
        """
        if not self.part.is_there(number):
            return False
        entry = self.part.manifest.shards[number]
        try:
            found = [(one.record.source, one.record.source_sha256) for one in read_shard(self.part.shard_path(number))]
        except ShardError:
            return False
        pieces = ((self.part.manifest.sources[piece.source], piece.clips) for piece in entry.pieces)
        expected = [((source.source, source.sha256), clips) for source, clips in pieces]
        if [(source, len(list(run))) for source, run in groupby(found)] != expected:
            raise JobError("holds other clips than the manifest says; move it to another folder")
        self._commit(Change(shards=((number, ShardEntry(self.part.bytes_there(number), entry.pieces)),)))
        return True

    def arrive(self, sources: list[SourceEntry]) -> None:
        """Put new sources into the manifest, before anything is made of them."""
        if sources:
            self._commit(Change(arrived=(len(self.part.manifest.sources), tuple(sources))))

    def add(self, source: int, clip: int, sample: Sample) -> None:
        """Add a sample of a source, by its number, and of the clip of this number in it."""
        self._samples.append((source, clip, sample))
        self._write_full_shard()

    @property
    def is_full(self) -> bool:
        """Whether the shard has no place left, and waits for samples that fill places."""
        return len(self._samples) == self.samples_per_shard

    def reserve(self, source: int) -> None:
        """Hold a place for the only clip of a source."""
        self._samples.append((source, 0, None))

    def fill(self, source: int, sample: Sample) -> None:
        """The sample of a place that was held."""
        self._samples[self._samples.index((source, 0, None))] = (source, 0, sample)
        self._write_full_shard()

    def give_up(self, source: int, outcome: Outcome | None) -> None:
        """Nothing comes to a place that was held. outcome: of the source, in the place of what was noted."""
        self._samples.remove((source, 0, None))
        self._outcomes = [one for one in self._outcomes if one.source != source]
        if outcome is not None:
            self.end(outcome)

    def end(self, outcome: Outcome) -> None:
        """Note what became of a source; the manifest learns it when all its clips are in shards."""
        self._outcomes.append(outcome)
        waiting = {source for source, _, _ in self._samples}
        free = [one for one in self._outcomes if one.source not in waiting]
        if len(free) >= OUTCOMES_TOGETHER:
            self._commit(Change(outcomes=tuple(free)))
            self._outcomes = [one for one in self._outcomes if one.source in waiting]

    def flush(self) -> None:
        """Write what is left into a shard that may be shorter, and what is known of the sources."""
        if self._samples:
            self._write_shard()
        if self._outcomes:
            self._commit(Change(outcomes=tuple(self._outcomes)))
            self._outcomes = []

    def replace(self, number: int, samples: Iterable[Sample]) -> None:
        """Write a shard of the manifest again, in the place of a damaged one or of none."""
        size = self._write(number, samples)
        before = self.part.manifest.shards[number]
        if size != before.bytes:
            self._commit(Change(shards=((number, ShardEntry(size, before.pieces)),)))

    def close(self) -> None:
        """Leave the manifest in one file."""
        self.lock.verify()
        self.part.journal.close()

    def _records(self, path: str) -> Iterator[ClipRecord]:
        try:
            for sample in read_shard(path):
                yield sample.record
        except ShardError as error:
            raise JobError(
                f"{error}; no run of k5 encode leaves such a file here: move it to another folder"
            ) from error

    def _write_full_shard(self) -> None:
        """Where there is one, with what is known of the source of its last sample, of which more clips may come."""
        if not self.is_full or any(sample is None for _, _, sample in self._samples):
            return
        source, _, last = self._samples[-1]
        ended = any(one.source == source for one in self._outcomes)
        assert last is not None
        assert last.record.source_sha256 is not None
        self._write_shard(*([] if ended else [Outcome(source, last.record.source_sha256, whole=False)]))

    def _write_shard(self, *outcomes: Outcome) -> None:
        number = len(self.part.manifest.shards)
        size = self._write(number, [sample for _, _, sample in self._samples if sample is not None])
        shard = ShardEntry(size, _pieces([(source, clip) for source, clip, _ in self._samples]))
        self._commit(Change(shards=((number, shard),), outcomes=(*self._outcomes, *outcomes)))
        self._samples, self._outcomes = [], []

    def _write(self, number: int, samples: Iterable[Sample]) -> int:
        self.lock.verify()
        with ShardWriter(self.part.shard_path(number)) as shard:
            for sample in samples:
                shard.write(sample)
        return shard.bytes

    def _commit(self, change: Change) -> None:
        self.lock.verify()
        self.part.journal.commit(change)


def _pieces(clips: list[tuple[int, int]]) -> tuple[Piece, ...]:
    """What follows in a shard, (source, clip) by (source, clip), as pieces of one source each."""
    runs = ([clip for _, clip in run] for _, run in groupby(clips, key=lambda one: one[0]))
    sources = [source for source, _ in groupby(clips, key=lambda one: one[0])]
    return tuple(Piece(source, run[0], len(run)) for source, run in zip(sources, runs, strict=True))
