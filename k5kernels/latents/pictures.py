"""Pictures of a shard, encoded in batches of one size, because one picture alone does not fill a machine.

The last bits of a latent depend on the batch that it was encoded in. A shard must come out the same wherever a job was
stopped before, and when it is made again, so its batches follow from its samples alone: of each size the first so many
pictures, the next so many, and the rest. One that cannot be encoded has no place in the shard, and no part in them:
the others are encoded again with those that come up.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from k5kernels.latents.encode import Encoding, Unencoded
from k5kernels.latents.failures import ending, told
from k5kernels.latents.manifest import Outcome
from k5kernels.latents.shards import Sample
from k5kernels.latents.video import VideoError

# Pixels of a batch: 16 pictures of 256 x 256, or one of 1024 x 1024, which any machine must take.
BATCH_PIXELS = 1 << 20


@dataclass(frozen=True, eq=False)
class Waiting:
    """A picture in its shard's place. number: of its source."""

    number: int
    picture: Unencoded

    def failed_by(self, error: Exception) -> tuple[str, Outcome | None]:
        """Why it has no sample, and what became of its source; None where it is to be tried again."""
        if not isinstance(error, VideoError):
            return told(error), None
        why = str(error).removeprefix(f"{self.picture.source.file}: ")
        return why, Outcome(self.number, self.picture.sha256, whole=True, failure=why)


Made = Sample | Exception
Settled = tuple[Waiting, Made]


class Pictures:
    """Those of the shard that is being filled and are not encoded yet, in order."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.waiting: list[Waiting] = []

    def add(self, waiting: Waiting) -> list[Settled]:
        """Encodes the pictures of its size where they are a whole batch."""
        self.waiting.append(waiting)
        same = [one for one in self.waiting if one.picture.size == waiting.picture.size]
        return self._settle([same]) if len(same) == batch_of(self._encoding, waiting.picture) else []

    def finish(self) -> list[Settled]:
        """Encodes what waits, for a shard that nothing more comes to: it is full, or the last one. Where a picture
        fails, the others wait on."""
        return self._settle(_in_batches(self._encoding, self.waiting))

    def _settle(self, batches: list[list[Waiting]]) -> list[Settled]:
        """All of them or, where pictures fail, these alone."""
        made: list[Settled] = []
        for batch in batches:
            made += zip(batch, samples_of(self._encoding, [one.picture for one in batch]), strict=True)
        failed: list[Settled] = [(one, sample) for one, sample in made if isinstance(sample, Exception)]
        settled = failed or made
        gone = {one for one, _ in settled}
        self.waiting = [one for one in self.waiting if one not in gone]
        return settled


def encode_again(encoding: Encoding, made: Iterable[Sample | Unencoded]) -> list[Sample]:
    """All that a shard holds, in order, with its pictures in the batches that they were in. Raises what one of them
    raises."""
    samples = list(made)
    waiting = [Waiting(place, one) for place, one in enumerate(samples) if isinstance(one, Unencoded)]
    for batch in _in_batches(encoding, waiting):
        for one, sample in zip(batch, samples_of(encoding, [one.picture for one in batch]), strict=True):
            if isinstance(sample, Exception):
                raise sample
            samples[one.number] = sample
    return [one for one in samples if isinstance(one, Sample)]


def samples_of(encoding: Encoding, pictures: list[Unencoded]) -> list[Made]:
    """Of pictures of one size; what one of them raises is in its place, unless all would raise it."""
    try:
        latents = encoding.latents(torch.stack([one.clip.frames for one in pictures]))
    except Exception as error:
        if ended := ending(error, pictures[0].source.file):
            raise ended from error
        if len(pictures) == 1:
            return [error]
        return [made for one in pictures for made in samples_of(encoding, [one])]
    made: list[Made] = []
    for one, latent in zip(pictures, latents, strict=True):
        try:
            made.append(encoding.sample_of(one, latent))
        except Exception as error:
            if ended := ending(error, one.source.file):
                raise ended from error
            made.append(error)
    return made


def batch_of(encoding: Encoding, picture: Unencoded) -> int:
    """How many pictures of this size go through the encoder together."""
    height, width = picture.size
    return max(1, min(BATCH_PIXELS // (height * width), encoding.most_together((1, height, width))))


def _in_batches(encoding: Encoding, waiting: list[Waiting]) -> list[list[Waiting]]:
    by_size: dict[tuple[int, int], list[Waiting]] = {}
    for one in waiting:
        by_size.setdefault(one.picture.size, []).append(one)
    batches = []
    for same in by_size.values():
        count = batch_of(encoding, same[0].picture)
        batches += [same[first : first + count] for first in range(0, len(same), count)]
    return batches
