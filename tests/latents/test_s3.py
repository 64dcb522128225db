"""A job whose sources and shards are in S3, by its own protocol: as on a disk, also where it is killed or refused.

The server is moto's, on this machine.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError
from command_line import k5
from encoding_jobs import CountingEncoder, Encode, contents, make_video, shards
from faults import COMPILER, FaultyJobs, faulty_jobs
from memory_folder import memory_folder
from s3_server import Server, cut, denied, killing, s3_server

from k5kernels import lock
from k5kernels.folder import Folder
from k5kernels.vae import weights

BUCKETS = count()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(lock, "TRY_SECONDS", 0)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield running
    running.arm()


@pytest.fixture
def bucket(running: Server) -> str:
    """The URL of an empty one."""
    name = f"bucket-{next(BUCKETS)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def objects(url: str) -> dict[str, bytes]:
    files = fsspec.filesystem("s3")
    files.invalidate_cache()
    return {name.rsplit("/", 1)[1]: files.cat_file(name) for name in files.find(url)}


def put(folder: Path, url: str) -> str:
    for path in folder.rglob("*.*"):
        fsspec.filesystem("s3").pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())
    return url


def keys(out: Path) -> list[str]:
    return sorted(sample.key for shard in shards(out) for sample in shard)


def test_sources_and_shards_in_s3_are_those_of_a_disk(
    encode: Encode, folder: Path, tmp_path: Path, encoder: CountingEncoder, server: Server, bucket: str
) -> None:
    make_video(folder / "more" / "d.mp4", 6)
    (folder / "b.txt").write_text("A caption")
    (folder / "broken.mp4").write_bytes(b"no video")
    expected = encode()
    url = put(folder, f"{bucket}/videos")
    summary = encode([url], out=f"{url}/latents")
    assert objects(f"{url}/latents") == contents(tmp_path / "out")
    assert (summary.samples, summary.captioned) == (expected.samples, 1)
    assert list(summary.failures) == [f"{url}/broken.mp4"]
    again = encode([url], out=f"{url}/latents")
    assert (again.samples, again.failures, encoder.clips) == (expected.samples, summary.failures, 0)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """(exit code, stderr without the lines of progress) of `k5 encode …`."""
    monkeypatch.setattr(weights, "load_encoder", lambda path: CountingEncoder())
    result = k5(f"encode {command} --vae none --clip-frames 5 --samples-per-shard 2", columns=400)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, "".join(line for line in result.stderr.splitlines(True) if line.startswith("k5: "))


WRONG = {
    "credentials": "for S3 set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "bucket": "The specified bucket does not exist; make it, or give another",
    "permission": "listing, reading, writing and deleting must be allowed there",
    "server": "check the network and, for a server of your own, AWS_ENDPOINT_URL",
}


@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        ("credentials", "out"),
        ("bucket", "out"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("permission", "out"), ("server", "out"), ("credentials", "videos"), ("permission", "videos"))
        ),
    ],
)
def test_what_is_wrong_with_a_store_is_one_line_that_says_what_to_do(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, wrong: str, at: str
) -> None:
    url = "s3://nowhere-at-all/x"
    if wrong == "credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
    elif wrong == "permission":
        server.arm(denied, lasts=True)
    elif wrong == "server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"none")
    videos, out = (tmp_path / "videos", url) if at == "out" else (url, tmp_path / "out")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    code, line = run(f"{videos} --out {out}", monkeypatch)
    assert (code, line.count("\n")) == (1, 1), line
    assert WRONG[wrong] in line
    assert url in line
    if wrong == "bucket":
        assert not fsspec.filesystem("s3").exists("s3://nowhere-at-all"), "a bucket that is only named was made"


@pytest.mark.slow
def test_a_second_job_is_refused_while_one_writes(
    folder: Path, server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Folder(f"{bucket}/out")
    with lock.locked(out, "encode.lock", lock.this_process("job", 1)):
        code, line = run(f"{folder} --out {out.out}", monkeypatch)
    assert (code, line.count("\n")) == (2, 1), line
    assert f"{out.out}: is being written by process" in line
    assert run(f"{folder} --out {out.out}", monkeypatch) == (0, "")


@pytest.mark.slow
def test_a_source_that_the_network_loses_is_told_and_the_others_are_encoded(
    encode: Encode, folder: Path, tmp_path: Path, server: Server, bucket: str
) -> None:
    url = put(folder, f"{bucket}/videos")
    encode(out=tmp_path / "expected")
    fsspec.filesystem("s3").find(url)
    server.arm(lambda environ: cut(environ) if "b.mp4" in environ["PATH_INFO"] else None, lasts=True)
    summary = encode([url])
    assert list(summary.failures) == [f"{url}/b.mp4"]
    assert summary.samples == 5
    server.arm()
    assert encode([url]).failures == {}
    assert keys(tmp_path / "out") == keys(tmp_path / "expected")


@pytest.mark.slow
def test_where_the_store_cannot_be_reached_any_more_the_run_ends(
    encode: Encode, folder: Path, tmp_path: Path, server: Server, bucket: str
) -> None:
    """Not one failure a source, of which there may be millions."""
    url = put(folder, f"{bucket}/videos")
    files = fsspec.get_filesystem_class("s3")
    get_file = files._get_file

    async def unreachable(self: Any, path: str, *arguments: Any, **options: Any) -> None:
        if path.endswith("b.mp4"):
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
        await get_file(self, path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_get_file", unreachable)
        files.clear_instance_cache()
        code, line = run(f"{url} --out {tmp_path / 'out'}", patch)
    assert (code, line.count("\n")) == (1, 1), line
    assert f"check the network and, for a server of your own, AWS_ENDPOINT_URL: '{url}/b.mp4'" in line
    files.clear_instance_cache()
    assert encode([url]).samples == 6


@pytest.mark.parametrize("first", [9, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 20))])
def test_a_network_that_goes_away_ends_a_run_in_one_line_and_the_next_one_goes_on(
    encode: Encode,
    folder: Path,
    tmp_path: Path,
    server: Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
) -> None:
    encode()
    monkeypatch.setattr(lock.Holder, "is_running_here", property(lambda holder: False))
    server.arm(cut, first, lasts=True)
    code, line = run(f"{folder} --out {bucket}/out", monkeypatch)
    assert (code, line.count("\n")) == (1, 1), line
    assert f"{bucket}/out" in line
    server.arm()
    assert run(f"{folder} --out {bucket}/out", monkeypatch) == (0, "")
    assert objects(f"{bucket}/out") == contents(tmp_path / "out")


class KilledJobs:
    """Jobs in processes of their own, which the server kills at a request."""

    def __init__(self, jobs: FaultyJobs, server: Server, videos: Path, bucket: str) -> None:
        self.jobs, self.server, self.videos, self.bucket = jobs, server, videos, bucket
        self.begun = self.ended("begun")
        make_video(videos / "0.mp4", 2, 9)
        self.expected = self.ended("begun")
        self.requests = self.last

    def ended(self, name: str) -> dict[str, bytes]:
        self.server.arm()
        result = self.jobs.run(self.videos, f"{self.bucket}/{name}")
        assert result.code == 0, result
        self.last = self.server.requests
        return objects(f"{self.bucket}/{name}")

    def check(self, request: int, after: bool) -> None:
        out = f"killed-{request}-{after}"
        for name, data in self.begun.items():
            fsspec.filesystem("s3").pipe_file(f"{self.bucket}/{out}/{name}", data)
        self.server.arm(killing(lambda: self.jobs.running), request, after)
        result = self.jobs.run(self.videos, f"{self.bucket}/{out}")
        assert result.code == -9, result
        left = objects(f"{self.bucket}/{out}")
        assert left.items() >= {name: data for name, data in self.begun.items() if name.endswith(".tar")}.items()
        assert self.ended(out) == self.expected, (request, after)


@pytest.fixture(scope="module")
def killed_jobs(running: Server) -> Iterator[Any]:
    if COMPILER is None:
        pytest.skip("needs a C compiler, for the shim that makes calls fail")
    fsspec.filesystem("s3").mkdir("killed")
    with memory_folder() as root:
        (root / "watched").mkdir()
        with faulty_jobs(root / "watched") as jobs:
            make_video(root / "watched" / "videos" / "m.mp4", 3, 1)
            yield KilledJobs(jobs, running, root / "watched" / "videos", "s3://killed")


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_may_be_killed_at_any_request(killed_jobs: KilledJobs, server: Server, after: bool) -> None:
    assert killed_jobs.requests > 15
    for request in range(1 + 3 * after, killed_jobs.requests + 1, 7):
        killed_jobs.check(request, after)
