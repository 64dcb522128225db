"""A job whose manifest or changes were damaged is refused in a line that names the file, or ends as if they were not.

No shard that is in the folder is lost or overwritten, whatever the damage.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from encoding_jobs import CountingEncoder, contents, make_video
from many_cases import refusal, tally
from mutations import mutate_bytes, mutate_json, nudge_json

from k5kernels.latents import journal
from k5kernels.latents.job import EncodeSummary, Step, encode_videos
from k5kernels.latents.manifest import change_from_json, manifest_from_json, manifest_to_json, seal

CLIPS_A_VIDEO, CLIPS_A_SHARD = 2, 2
MANIFEST = "manifest.json"

Files = dict[str, bytes]


@cache
def encoder() -> CountingEncoder:
    """One for all cases of a process."""
    return CountingEncoder()


def encode(videos: Path, out: Path, progress: Callable[[Step], None] = lambda step: None) -> EncodeSummary:
    return encode_videos([videos], encoder(), out, clip_frames=1, samples_per_shard=CLIPS_A_SHARD, progress=progress)


def fill(out: Path, files: Files) -> None:
    """Bring a folder to hold these files and no others. What is so already stays, as to write it all takes long."""
    out.mkdir(exist_ok=True)
    there = contents(out)
    for name in {*there, *files}:
        if name not in files:
            (out / name).unlink()
        elif there.get(name) != files[name]:
            (out / name).write_bytes(files[name])


def is_shard(name: str) -> bool:
    return name.endswith(".tar")


def shard_files(out: Path) -> dict[str, tuple[int, int]]:
    """Name of each shard -> what differs when it was written again, were it with the same bytes."""
    status = {path.name: path.stat() for path in out.iterdir() if is_shard(path.name)}
    return {name: (one.st_ino, one.st_mtime_ns) for name, one in status.items()}


@dataclass(frozen=True)
class DamagedJob:
    """A job of several runs, the last of which was stopped when some of its changes were files of their own.

    videos: their folder. stopped: what it left. earlier: the manifests it had before. expected: what the job ends with.
    """

    videos: Path
    stopped: Files
    earlier: tuple[bytes, ...]
    expected: Files

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        damage = draw.choice((self._other_bytes, self._other_bytes, self._other_files, self._other_values))
        files, damaged = damage(draw)
        out = folder / "out"
        fill(out, files)
        before = shard_files(out)
        refused = refusal(lambda: encode(self.videos, out), str(out / damaged) if damaged else str(out))
        assert shard_files(out).items() >= before.items(), "a shard is lost or overwritten"
        if refused is not None:
            return "refused in one line"
        if damage == self._other_values:
            # Sealed by another program than this library, it is another manifest, which is as whole.
            return "taken, sealed again"
        assert contents(out) == self.expected, "the job does not end as if nothing had been damaged"
        return "ended the same"

    def _names(self) -> list[str]:
        return [name for name in self.stopped if not is_shard(name)]

    def _other_bytes(self, draw: random.Random) -> tuple[Files, str]:
        name = draw.choice(self._names())
        return self.stopped | {name: mutate_bytes(self.stopped[name], draw)}, name

    def _other_values(self, draw: random.Random) -> tuple[Files, str]:
        name = draw.choice(self._names())
        stored = json.loads(self.stopped[name])
        del stored["sha256"]
        damaged = draw.choice((mutate_json, nudge_json))(json.dumps(stored).encode(), draw)
        return self.stopped | {name: seal(damaged.decode("latin-1").rstrip().removesuffix("}"))}, ""

    def _other_files(self, draw: random.Random) -> tuple[Files, str]:
        """Files dropped, copied over others, or from before, as by people and programs that copy a folder in part."""
        files = dict(self.stopped)
        name, other = draw.choice(self._names()), draw.choice(self._names())
        match draw.randrange(4):
            case 0:
                del files[name]
            case 1:
                files[other] = files[name]
            case 2:
                files[MANIFEST] = draw.choice(self.earlier)
            case _:
                files = {MANIFEST: draw.choice(self.earlier)} | {n: files[n] for n in files if is_shard(n)}
        return files, ""


@pytest.fixture(scope="module")
def damaged_job(tmp_path_factory: pytest.TempPathFactory) -> DamagedJob:
    root = tmp_path_factory.mktemp("jobs")
    videos, out, earlier = root / "videos", root / "out", []
    for run, names in enumerate(("ab", "c")):
        for name in names:
            make_video(videos / f"{run}{name}.mp4", CLIPS_A_VIDEO, seed=ord(name))
        (videos / f"{run}broken.mp4").write_bytes(b"no video")
        encode(videos, out)
        earlier.append((out / MANIFEST).read_bytes())
    for name in "defg":
        make_video(videos / f"0{name}.mp4", CLIPS_A_VIDEO, seed=ord(name))
    shutil.copytree(out, root / "expected")
    encode(videos, root / "expected")

    def stop(step: Step) -> None:
        if step.number == 4 and step.clips == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SMALL_BYTES", 0)
        patch.setattr(journal, "GROWTH", 0)
        with pytest.raises(KeyboardInterrupt):
            encode(videos, out, stop)
    stopped = contents(out)
    manifest = manifest_from_json(stopped[MANIFEST])
    for number in range(len(stopped) - len([*out.glob("*.tar")]) - 1):
        manifest.apply(change_from_json(number, stopped[journal.change_name("", number)]))
        earlier.append(manifest_to_json(manifest))
    return DamagedJob(videos, stopped, tuple(earlier), contents(root / "expected"))


def test_an_undamaged_job_ends_as_expected(damaged_job: DamagedJob, tmp_path: Path) -> None:
    changes = [name for name in damaged_job.stopped if ".change" in name]
    assert len(changes) >= 4
    fill(tmp_path / "out", damaged_job.stopped)
    encode(damaged_job.videos, tmp_path / "out")
    assert contents(tmp_path / "out") == damaged_job.expected


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_jobs(damaged_job: DamagedJob, count: int) -> None:
    counts = tally("manifests and changes", damaged_job, range(count))
    assert counts["refused in one line"] > count // 2
    assert counts["ended the same"] > 0
    assert counts["taken, sealed again"] > 0
