"""A model of hopper_pair_kernel's barriers: one producer and two consumers, whose steps come in any order.

It follows k5kernels/triton/hopper_pair.py line by line. A tile holds the number of its entry, or None while a load is
under way; what is read or multiplied is asserted to be the entry that the reader is at.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

# What may be left out of the protocol, to see that the model notices.
FAULTS = (
    "consumer does not arrive",
    "producer does not arrive for private entries",
    "producer does not wait",
    "first private stage is that of the last shared entry",
    "phases are not flipped",
)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced loads have come."""

    count: int
    phase: int = 0
    pending: int = field(init=False)
    loads: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity

    def arrive(self) -> None:
        assert self.pending > 0, "an arrival too many"
        self.pending -= 1
        self._complete()

    def expect(self) -> None:
        self.loads += 1
        self.arrive()

    def loaded(self) -> None:
        self.loads -= 1
        self._complete()

    @property
    def at_rest(self) -> bool:
        return self.pending == self.count and self.loads == 0

    def _complete(self) -> None:
        if self.pending == 0 and self.loads == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Pair:
    """Entries of both readers, then private ones taking turns. A step of an actor yields whether it got on."""

    def __init__(self, counts: tuple[int, int, int], stages: int, order: random.Random, fault: str | None) -> None:
        self.shared, *private = counts
        self.readers: list[tuple[int, ...]] = [(0, 1)] * self.shared
        for turn in range(max(private)):
            self.readers += [(me,) for me in (0, 1) if turn < private[me]]
        self.stages, self.order, self.fault = stages, order, fault
        self.keys: list[int | None] = [None] * stages
        self.values: list[int | None] = [None] * stages
        self.key_full, self.value_full = ([Barrier(1) for _ in range(stages)] for _ in range(2))
        self.empty = [Barrier(2) for _ in range(stages)]
        self.in_flight: list[tuple[list[int | None], Barrier, int, int]] = []

    def ends(self) -> bool:
        """Run to the end; False where all wait for ever. AssertionError where a tile is not what it should be."""
        actors = [self.produce(), self.consume(0), self.consume(1)]
        while actors:
            turns: list[Iterator[bool] | None] = [*actors, *[None] * bool(self.in_flight)]  # None: a load arrives
            self.order.shuffle(turns)
            if not any(self._step(actors, turn) for turn in turns):
                return False
        assert not self.in_flight
        assert all(bar.at_rest for bar in (*self.key_full, *self.value_full, *self.empty)), "a phase is left open"
        return True

    def _step(self, actors: list[Iterator[bool]], turn: Iterator[bool] | None) -> bool:
        if turn is None:
            tiles, bar, stage, entry = self.in_flight.pop(self.order.randrange(len(self.in_flight)))
            tiles[stage] = entry
            bar.loaded()
            return True
        try:
            return next(turn)
        except StopIteration:
            actors.remove(turn)
            return True

    def first_private(self, me: int) -> int:
        half = self.stages // 2
        last = (self.shared - 1) % self.stages - me * half
        if self.fault == "first private stage is that of the last shared entry":
            return last if 0 <= last < half else 0
        return (last + 1) % half if 0 <= last < half else 0

    def flipped(self, phases: int, stage: int) -> int:
        return phases if self.fault == "phases are not flipped" else phases ^ (1 << stage)

    def produce(self) -> Iterator[bool]:
        following, phases = [self.first_private(0), self.first_private(1)], (1 << self.stages) - 1
        half = self.stages // 2
        for number, readers in enumerate(self.readers):
            if len(readers) == 2:
                stage = number % self.stages
            else:
                (me,) = readers
                stage = me * half + following[me]
                following[me] = (following[me] + 1) % half
            while self.fault != "producer does not wait" and not self.empty[stage].passed((phases >> stage) & 1):
                yield False
            phases = self.flipped(phases, stage)
            for tiles, bars in ((self.keys, self.key_full), (self.values, self.value_full)):
                bars[stage].expect()
                tiles[stage] = None
                self.in_flight.append((tiles, bars[stage], stage, number))
                yield True
            if len(readers) == 1 and self.fault != "producer does not arrive for private entries":
                self.empty[stage].arrive()
            yield True

    def consume(self, me: int) -> Iterator[bool]:
        old, phases, first = None, 0, self.first_private(me)
        own = [number for number, readers in enumerate(self.readers) if me in readers]
        half = self.stages // 2
        for j, number in enumerate(own):
            stage = j % self.stages if j < self.shared else me * half + (j - self.shared + first) % half
            phase = (phases >> stage) & 1
            phases = self.flipped(phases, stage)
            while not self.key_full[stage].passed(phase):
                yield False
            assert self.keys[stage] == number
            yield True  # the scores are under way, and beside them the products with the last values
            assert self.keys[stage] == number
            if old is not None:
                assert self.values[old[0]] == old[1]
            while not self.value_full[stage].passed(phase):
                yield False
            if old is not None:
                assert self.values[old[0]] == old[1]
                self.release(old[0], me)
            old = stage, number
            yield True
        if old is not None:
            assert self.values[old[0]] == old[1]
            yield True
            assert self.values[old[0]] == old[1]
            self.release(old[0], me)

    def release(self, stage: int, me: int) -> None:
        if not (self.fault == "consumer does not arrive" and me == 1):
            self.empty[stage].arrive()
