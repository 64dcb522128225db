"""Sources to shards: a job that may be stopped at any moment and goes on from there (§6.1).

A source is known by its path below what was given and by its content. Sources are encoded in the order of their
arrival: those that one run adds, sorted by path, come after all that were there. The last shard of a run's sources may
hold fewer samples than the others. So a run never changes a finished shard, and whatever stops it, the next one
writes what an undisturbed run would have written.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from k5kernels.folder import Folder
from k5kernels.latents.ahead import Ahead, Stream
from k5kernels.latents.captions import Captions, captions_of
from k5kernels.latents.encode import Encoding, Unencoded
from k5kernels.latents.encoders import Encoder
from k5kernels.latents.failures import ending, told
from k5kernels.latents.known import Known
from k5kernels.latents.manifest import Outcome, SourceEntry
from k5kernels.latents.parts import JobError, job_id, lock_name, open_part, prefix_of
from k5kernels.latents.pictures import Pictures, Settled, Waiting, encode_again
from k5kernels.latents.reader import End, Read, SourceReader, Tried, frame_bytes
from k5kernels.latents.shards import Sample
from k5kernels.latents.sources import Listing, Source, find_sources, is_of_share
from k5kernels.latents.text import CaptionEncoder
from k5kernels.latents.video import AS_MODELS, Bucket, Clip, Reading, VideoError
from k5kernels.latents.writer import PartWriter
from k5kernels.lock import locked, this_process
from k5kernels.text_encoders import TextEncoder
from k5kernels.vae.plan import Mode

# So many bytes of frames may wait of each source that is read; a longer clip waits alone.
WAITING_BYTES = 256 << 20


@dataclass(frozen=True)
class Seconds:
    """How long a run encoded, and what of that it did one after the other: wait for frames, encode, write shards.

    decode, resize: how long sources were read and decoded beside that, and their frames cut and resized, in all threads
    together.
    """

    run: float = 0.0
    wait: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    decode: float = 0.0
    resize: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.run:.1f} s: {self._shares('encode', 'wait', 'write')}; {self._shares('decode', 'resize')} beside it"
        )

    def _shares(self, *parts: str) -> str:
        return ", ".join(f"{name} {getattr(self, name) / self.run:.1%}" for name in parts)


@dataclass(frozen=True)
class Step:
    """Where a job is. Reported when a source is begun, after each of its clips, and when it is done with.

    source: its file. bytes: its size. number, sources: how many were begun, of how many. bytes_done, bytes_all: sizes
    of the sources that are done with, and of all. frames, announced: frames of the source encoded so far, and those
    that it announces (0 where it does not). clips: encoded of it in this run. outcome: None until it is done with; then
    "", or what failed. compared: whether it is a finished source that is only read, to see that it is the same still.
    seconds: so far.
    """

    source: str
    bytes: int
    number: int
    sources: int
    bytes_done: int
    bytes_all: int
    frames: int = 0
    announced: int = 0
    clips: int = 0
    outcome: str | None = None
    compared: bool = False
    seconds: Seconds = Seconds()


@dataclass
class EncodeSummary:
    """What is in the folder after a run, and what is not.

    shards, samples: in the folder. shards_kept: of them, from before this run. captioned, sources: how many of the
    sources of this process have a caption. failures: file -> why it is not encoded, or not to its end. left_out: file
    or folder -> why nothing is lost by it. others: suffix -> files that hold no video by their names. seconds: of the
    encoding, without comparing what was encoded before.
    """

    shards: int = 0
    samples: int = 0
    shards_kept: int = 0
    captioned: int = 0
    sources: int = field(default=0, compare=False)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    seconds: Seconds = field(default=Seconds(), compare=False)


def encode_videos(
    paths: Iterable[str | Path],
    encoder: Encoder,
    out: str | Path,
    *,
    resolution: int | tuple[Bucket, ...] = 256,
    clip_frames: int = 25,
    samples_per_shard: int = 16,
    max_clips: int | None = None,
    reading: Reading = AS_MODELS,
    text_encoder: TextEncoder | None = None,
    mode: Mode = "stream",
    memory_budget: int | None = None,
    index: int = 0,
    of: int = 1,
    overwrite: bool = False,
    retry_failed: bool = False,
    decoders: int = 2,
    captions: Mapping[str, str] | None = None,
    on_captions: Callable[[int, int], None] = lambda captioned, sources: None,
    progress: Callable[[Step], None] = lambda step: None,
) -> EncodeSummary:
    """Encode videos and pictures into shards `out/00000.tar`, …; `out` is a folder or an fsspec URL.

    paths: files, and folders that stand for all that is in them, or their URLs: a remote file is copied to a temporary
    one while it is read. One that cannot be encoded is reported in the summary and the others are; of one that breaks
    on its way, the clips before the break are kept.
    resolution, clip_frames, max_clips, reading, mode, memory_budget: as in `Encoding`.
    text_encoder: where given, each clip's caption, the empty one where it has none, is stored as it gives it
    (`k5kernels.latents.text`).
    index, of: this process is number `index` of `of` that share the work; each writes shards of its own.
    overwrite: what another job has left in the folder is deleted. retry_failed: sources whose content failed before
    are tried again; the others are tried again anyway.
    decoders: so many sources are read at once, in threads beside the encoder; the shards do not depend on it.
    captions: by path or name, as `match_captions` takes them; they go before those in files beside the videos
    (`sidecar_captions`). A clip keeps the caption that it was encoded with; a video is not encoded as long as what
    stands beside it cannot be its caption. on_captions: called at the start with how many sources of this process have
    a caption, and how many there are.
    A second call goes on where the first ended, and encodes what is new. Finished shards are never touched; one that
    is missing or damaged is made again.
    Raises ValueError for arguments that do not fit, captions that fit no source or two, a folder of another job, and
    one that another process is writing to; OSError where `out` cannot be written, or where what fails would fail for
    every source (no memory, no threads, no open files).
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: expected at least 1, got {samples_per_shard}")
    if not 0 <= index < of <= 10_000:
        raise ValueError(f"index, of: expected an index from 0 to of - 1, of up to 10000, got {index} of {of}")
    if not 1 <= decoders <= 64:
        raise ValueError(f"decoders: expected 1 to 64 threads, got {decoders}")
    texts = None if text_encoder is None else CaptionEncoder(text_encoder)
    encoding = Encoding(encoder, resolution, clip_frames, max_clips, reading, texts, mode, memory_budget)
    settings = encoding.settings() | {"samples_per_shard": samples_per_shard}
    folder = Folder(out)
    listing = find_sources(paths, folder.local or folder.out)
    mine = [source for source in listing.sources if is_of_share(source.path, index, of)]
    matched = captions_of(listing, mine, captions)
    on_captions(len(matched.captions), len(mine))
    folder.create()
    prefix = prefix_of(index, of)
    with _ending_named(folder), locked(folder, lock_name(prefix), this_process(job_id(settings), of)) as lock:
        part = open_part(folder, lock.holder, prefix, settings, overwrite)
        known = Known(part.manifest, part.others, retry_failed)
        writer = PartWriter(part, lock, known, samples_per_shard)
        return _Run(writer, known, encoding, listing, mine, matched, decoders, progress).run()


@contextmanager
def _ending_named(folder: Folder) -> Iterator[None]:
    """No memory and no threads are the system's errors, and named."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if ended := ending(error, folder.out):
            raise ended from error
        raise


class _Run:
    """One run of one part."""

    def __init__(
        self,
        writer: PartWriter,
        known: Known,
        encoding: Encoding,
        listing: Listing,
        mine: list[Source],
        captions: Captions,
        decoders: int,
        progress: Callable[[Step], None],
    ) -> None:
        """mine: the listed sources that this process encodes."""
        self.writer, self.known, self.encoding = writer, known, encoding
        self.captions, self.progress, self.pictures = captions, progress, Pictures(encoding)
        self.manifest = writer.part.manifest
        self.summary = EncodeSummary(failures=listing.failures, left_out=listing.left_out, others=listing.others)
        self.summary.captioned, self.summary.sources = len(captions.captions), len(mine)
        self.listed, self.mine = _by_path(listing.sources), _by_path(mine)
        self.changed: dict[tuple[str, str], None] = {}
        self.reader, self.decoders = SourceReader(encoding, captions.problems), decoders
        self.seconds: Callable[[], Seconds] = Seconds
        self.spent = {"wait": 0.0, "encode": 0.0, "write": 0.0, "resize": 0.0}
        self.step = Step("", 0, 0, 0, 0, 0)

    def run(self) -> EncodeSummary:
        self.writer.adopt()
        damaged = self.writer.part.damaged_shards()
        self.summary.shards_kept = self._count_shards() - len(damaged)
        for number in damaged:
            self._restore(number)
        self.spent = dict.fromkeys(self.spent, 0.0)
        ended = [path for path in self.mine if self.known.is_ended(path)]
        self.writer.arrive(self._new())
        self._encode(list(pairwise([*self.manifest.batches, len(self.manifest.sources)])))
        self._compare(ended)
        if self.changed:
            first = len(self.manifest.sources)
            self.writer.arrive([SourceEntry(path, sha256) for path, sha256 in self.changed])
            self._encode([(first, len(self.manifest.sources))])
        self.writer.close()
        return self._summarize()

    def _new(self) -> list[SourceEntry]:
        """The sources that arrive. Where several files have one path, their content tells them apart at once."""
        new: dict[tuple[str, str | None], SourceEntry] = {}
        for path, sources in self.mine.items():
            if len(sources) == 1:
                if self.known.is_new(path):
                    new[path, None] = SourceEntry(path)
                continue
            for source in sources:
                sha256 = self._hash(source)
                if sha256 is not None and self.known.find(path, sha256) is None:
                    new[path, sha256] = SourceEntry(path, sha256)
        return list(new.values())

    def _encode(self, batches: list[tuple[int, int]]) -> None:
        """Encode what is open in these ranges of sources; what remains of a batch's clips becomes a shorter shard."""
        todo = [[number for number in range(*batch) if self._is_todo(number)] for batch in batches]
        sizes = [self._files(number)[0].bytes for batch in todo for number in batch]
        self.step = Step("", 0, 0, len(sizes), 0, sum(sizes), seconds=self.step.seconds)
        before, began = self.step.seconds, time.perf_counter()
        with Ahead[Read](self.decoders, WAITING_BYTES, frame_bytes) as ahead:

            def seconds() -> Seconds:
                run = before.run + time.perf_counter() - began
                resize = self.spent["resize"] - before.resize
                return Seconds(run, decode=before.decode + ahead.seconds - resize, **self.spent)

            self.seconds = seconds
            streams = ahead.run(partial(self._read, number) for number in chain(*todo))
            for batch in todo:
                for number in batch:
                    self._encode_source(number, next(streams))
                self._finish_pictures(last=True)
                with self._timed("write"):
                    self.writer.flush()
            spent = seconds()
        self.summary.seconds, self.seconds = spent, lambda: spent

    def _read(self, number: int) -> Iterator[Read]:
        return self.reader.read(self._files(number), self.manifest.sources[number].sha256)

    def _files(self, number: int) -> list[Source]:
        return self.mine[self.manifest.sources[number].source]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - began

    def _taken(self, stream: Stream[Read]) -> Iterator[Read]:
        """The same, with the time that is spent on waiting."""
        items = iter(stream)
        while True:
            with self._timed("wait"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _is_todo(self, number: int) -> bool:
        entry = self.manifest.sources[number]
        return self.known.is_open(entry) and entry.source in self.mine

    def _encode_source(self, number: int, stream: Stream[Read]) -> None:
        """Encode the rest of a source's clips, and note what became of it."""
        path = self.manifest.sources[number].source
        self._begin(self.mine[path][0])
        taken = self._taken(stream)
        found = self._find(number, taken)
        if found is None:
            anew = f"{self.step.source}: was changed since it was begun; it is begun anew"
            self._end(self.summary.failures.get(self.step.source, anew))
            return
        source, sha256 = found
        first, end, picture = self.known.clips(path, sha256), End(), None
        for clip, made in enumerate(self._samples(source, sha256, taken, first, end), start=first):
            if isinstance(made, Unencoded):
                picture = Waiting(number, made)
                self.writer.reserve(number)
                continue
            with self._timed("write"):
                self.writer.add(number, clip, made)
            self._finish_pictures()
        with self._timed("write"):
            if end.whole or first or self.step.clips:
                self.writer.end(Outcome(number, sha256, end.whole, end.failure))
        why = end.passing or end.failure
        if why is not None:
            self._fail(source, why, lost=bool(end.passing or first or self.step.clips))
        self._end("" if why is None else f"{source.file}: {why}")
        if picture is not None:
            with self._timed("encode"):
                settled = self.pictures.add(picture)
            self._place(settled)
            self._finish_pictures()

    def _finish_pictures(self, last: bool = False) -> None:
        """Encode those that wait, where the shard has no place left or is the last one."""
        while self.pictures.waiting and (last or self.writer.is_full):
            with self._timed("encode"):
                settled = self.pictures.finish()
            self._place(settled)

    def _place(self, settled: list[Settled]) -> None:
        """Put pictures into the places of the shard that they waited for, and note those that failed."""
        for one, made in settled:
            with self._timed("write"):
                if isinstance(made, Sample):
                    self.writer.fill(one.number, made)
                    continue
                why, outcome = one.failed_by(made)
                self.writer.give_up(one.number, outcome)
            file = one.picture.source.file
            self._fail(one.picture.source, why, lost=outcome is None)
            self.progress(replace(self.step, source=file, outcome=f"{file}: {why}"))

    def _samples(
        self, source: Source, sha256: str, reads: Iterator[Read], first: int, end: End
    ) -> Iterator[Sample | Unencoded]:
        """Samples of clips from number `first` on, a picture as it is. How it ended ends up in `end`, unless all
        sources would end so."""
        caption = self.captions.captions.get(source.file)
        number = 0
        for read in reads:
            if isinstance(read, End):
                end.whole, end.failure, end.passing = read.whole, read.failure, read.passing
            if not isinstance(read, Clip):
                continue
            self.spent["resize"] += read.resize_seconds
            self._report(frames=read.first_frame + len(read.frames), announced=read.announced_frames)
            number += 1
            if number <= first:
                continue
            if number == 1 and read.rate is None:
                self._report(clips=1)
                yield Unencoded(source, sha256, read, caption)
                continue
            try:
                with self._timed("encode"):
                    sample = self.encoding.sample(source, sha256, read, caption)
            except Exception as error:
                if ended := ending(error, source.file):
                    raise ended from error
                if isinstance(error, VideoError):
                    end.whole, end.failure = True, str(error).removeprefix(f"{source.file}: ")
                else:
                    end.passing = told(error)
                return
            self._report(clips=self.step.clips + 1)
            yield sample

    def _find(self, number: int, reads: Iterator[Read]) -> tuple[Source, str] | None:
        """The file of a source that is open, and its content's hash; None where it cannot be read, or is another."""
        entry = self.manifest.sources[number]
        for _ in self.mine[entry.source]:
            tried = next(reads)
            assert isinstance(tried, Tried)
            sha256 = self._hash_of(tried)
            if sha256 is None:
                continue
            if entry.sha256 in (None, sha256):
                return tried.source, sha256
            if self.known.find(entry.source, sha256) is None:
                self.changed[entry.source, sha256] = None
            why = "was changed before it was encoded to its end; what there is of it is kept"
            self.writer.end(Outcome(number, entry.sha256, whole=True, failure=why))
        return None

    def _compare(self, paths: list[str]) -> None:
        """Read sources again that have ended, to see that they are the same still."""
        sources = [source for path in paths for source in self.mine[path]]
        self.step = Step("", 0, 0, len(sources), 0, sum(source.bytes for source in sources), compared=True)
        for source in sources:
            self._begin(source)
            sha256 = self._hash(source)
            entry = None if sha256 is None else self.known.find(source.path, sha256)
            if entry is not None and entry.failure is not None:
                self._fail(source, entry.failure, lost=entry.clips > 0)
            elif entry is None and sha256 is not None:
                self.changed[source.path, sha256] = None
            self._end(self.summary.failures.get(source.file, ""))

    def _restore(self, number: int) -> None:
        """Make a shard again that is missing or damaged, where its sources are among those given."""
        samples: list[Sample | Unencoded] = []
        path, problem = self.writer.part.shard_path(number), ""
        try:
            if self.writer.adopt_again(number):
                return
        except JobError as error:
            self.summary.failures[path] = f"{path}: {error}"
            return
        for piece in self.manifest.shards[number].pieces:
            entry, end = self.manifest.sources[piece.source], End()
            same = (one for one in self.listed.get(entry.source, ()) if self._hash(one) == entry.sha256)
            source = next(same, None)
            if source is None or entry.sha256 is None:
                problem = f"{entry.source}, of which it was made, is not among the given files"
                break
            reads = self._clips_and_end(source, end)
            clips = list(islice(self._samples(source, entry.sha256, reads, piece.first_clip, end), piece.clips))
            if len(clips) < piece.clips:
                problem = f"{source.file}: {end.passing or end.failure or 'has fewer clips than before'}"
                break
            samples.extend(clips)
        try:
            whole = [] if problem else encode_again(self.encoding, samples)
        except VideoError as error:
            problem = str(error)
        if problem:
            self.summary.failures[path] = f"{path}: is missing or damaged, and was not made again: {problem}"
        else:
            self.writer.replace(number, whole)

    def _clips_and_end(self, source: Source, end: End) -> Iterator[Read]:
        yield from self.reader.clips(source, end)
        yield end

    def _hash(self, source: Source) -> str | None:
        return self._hash_of(self.reader.try_file(source))

    def _hash_of(self, tried: Tried) -> str | None:
        """sha256 of the content; None where it cannot be read, which is then among the failures."""
        if tried.sha256 is None:
            self._fail(tried.source, tried.why, lost=True)
        return tried.sha256

    def _fail(self, source: Source, why: str, lost: bool) -> None:
        """Note a failure; where nothing is lost by it, and none was expected to be there, what was left out."""
        noted = self.summary.failures if lost or source.is_expected else self.summary.left_out
        noted[source.file] = f"{source.file}: {why}"

    def _begin(self, source: Source) -> None:
        number = self.step.number + 1
        self._report(
            source=source.file, bytes=source.bytes, number=number, frames=0, announced=0, clips=0, outcome=None
        )

    def _end(self, outcome: str) -> None:
        self._report(bytes_done=self.step.bytes_done + self.step.bytes, outcome=outcome)

    def _report(self, **changes: Any) -> None:
        self.step = replace(self.step, seconds=self.seconds(), **changes)
        self.progress(self.step)

    def _count_shards(self) -> int:
        return sum(len(manifest.shards) for manifest in (self.manifest, *self.writer.part.others))

    def _summarize(self) -> EncodeSummary:
        self.summary.shards = self._count_shards()
        manifests = (self.manifest, *self.writer.part.others)
        self.summary.samples = sum(entry.clips for manifest in manifests for entry in manifest.sources)
        return self.summary


def _by_path(sources: list[Source]) -> dict[str, list[Source]]:
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.path, []).append(source)
    return found
