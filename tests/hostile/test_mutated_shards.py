"""A damaged shard is refused in a line that names it, or gives samples that a writer would take; no sample is lost."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from latent_samples import sample
from many_cases import refusal, tally
from mutations import mutate_bytes, mutate_tar_members

from k5kernels.latents.shards import Sample, ShardWriter, read_shard
from train.latents import LatentSet, read_shards

KEYS = ["c-0", "c-5"]


@dataclass(frozen=True)
class DamagedShard:
    """The shard between two good ones, as training reads them."""

    shard: bytes
    good: bytes

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        in_members = draw.random() < 0.5
        damaged = folder / "1.tar"
        damaged.write_bytes((mutate_tar_members if in_members else mutate_bytes)(self.shard, draw))
        for neighbour in (folder / "0.tar", folder / "2.tar"):
            if not neighbour.exists():
                neighbour.write_bytes(self.good)
        read: dict[str, list[Sample]] = {f"{folder}/{number}.tar": [] for number in range(3)}

        def samples() -> Iterator[Sample]:
            for one in read_shards(folder):
                read[one.shard].append(one)
                yield one

        refused = refusal(lambda: LatentSet(samples(), {}), str(damaged))
        neighbour, taken, last = read.values()
        assert [one.key for one in neighbour] == ["g-0"], "the good shard before it is lost"
        if refused is not None:
            return "refused in one line"
        assert [one.key for one in last] == ["g-0"], "the good shard after it is lost"
        with ShardWriter(folder / "again") as writer:
            for one in taken:
                writer.write(one)
        keys = [one.key for one in taken]
        if in_members:
            # A member more or less is another shard, which is as whole.
            return "taken, other members"
        assert keys == KEYS, f"lost samples without a word: {keys}"
        return "taken"


@pytest.fixture(scope="module")
def damaged_shard(tmp_path_factory: pytest.TempPathFactory) -> DamagedShard:
    folder = tmp_path_factory.mktemp("shards")
    for name, source, first_frames in (("shard", "clip.mp4", (0, 5)), ("good", "good.mp4", (0,))):
        with ShardWriter(folder / name) as writer:
            for first_frame in first_frames:
                writer.write(sample(source, (2, 2, 4), first_frame))
    return DamagedShard((folder / "shard").read_bytes(), (folder / "good").read_bytes())


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_shards(damaged_shard: DamagedShard, count: int) -> None:
    counts = tally("shards", damaged_shard, range(count))
    assert counts["refused in one line"] > count // 2
    assert counts["taken"] > 0


def test_an_undamaged_shard_gives_its_samples(damaged_shard: DamagedShard, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(damaged_shard.shard)
    assert [one.key for one in read_shard(tmp_path / "0.tar")] == KEYS
