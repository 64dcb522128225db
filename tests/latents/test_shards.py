"""Latent shards: what is written reads back, and a damaged sample is named."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import webdataset
from safetensors.torch import save

from k5kernels.latents.shards import Sample, ShardError, ShardWriter, read_shard, write_whole


def sample(number: int = 0, dtype: torch.dtype = torch.float16, **meta: Any) -> Sample:
    latent = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
    described = {
        "frames": 5,
        "height": 32,
        "width": 48,
        "rate": "30000/1001",
        "source": "a b.mp4",
        "first_frame": number,
    }
    return Sample(f"clip-{number:04d}", latent, described | meta)


def write(path: str | Path, *samples: Sample) -> None:
    with ShardWriter(path) as shard:
        for one in samples:
            shard.write(*one)


def write_twice(shard: ShardWriter, one: Sample) -> None:
    shard.write(*one)
    shard.write(*one)


def write_members(path: Path, members: dict[str, bytes]) -> None:
    """A tar of our own making, to be wrong in ways that the writer refuses."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(one: Sample, **meta: Any) -> dict[str, bytes]:
    text = json.dumps({**one.meta, **meta}).encode()
    return {f"{one.key}.json": text, f"{one.key}.safetensors": save({"latent": one.latent})}


def assert_same(actual: Sample, expected: Sample) -> None:
    assert (actual.key, actual.meta) == (expected.key, expected.meta)
    assert actual.latent.dtype == expected.latent.dtype
    assert torch.equal(actual.latent, expected.latent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_come_back_in_order(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = [sample(number, dtype) for number in (2, 0, 1)]
    write(tmp_path / "00000.tar", *samples)
    for actual, expected in zip(read_shard(tmp_path / "00000.tar"), samples, strict=True):
        assert_same(actual, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["00000.tar"]


def test_any_fsspec_url_serves() -> None:
    write("memory://test_shards/00000.tar", sample())
    (actual,) = read_shard("memory://test_shards/00000.tar")
    assert_same(actual, sample())


def test_float32_is_stored_as_float16(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", sample(dtype=torch.float32))
    (actual,) = read_shard(tmp_path / "a.tar")
    assert_same(actual, sample())


def test_latents_of_inference_mode_can_be_written(tmp_path: Path) -> None:
    with torch.inference_mode():
        write(tmp_path / "a.tar", sample(dtype=torch.float32))
    (actual,) = read_shard(tmp_path / "a.tar")
    assert not actual.latent.is_inference()


def test_webdataset_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", sample(0), sample(1))
    stored = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [one["__key__"] for one in stored] == ["clip-0000", "clip-0001"]
    assert json.loads(stored[0]["json"]) == sample().meta


def test_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.tar", sample(0), sample(1))
    monkeypatch.setattr("time.time", lambda: 2e9)
    other = sample(1)
    write(tmp_path / "b.tar", sample(0), other._replace(meta=dict(reversed(other.meta.items()))))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("folder", ["{tmp}", "memory://test_shards_failed"])
def test_failed_writer_leaves_the_former_shard(tmp_path: Path, folder: str) -> None:
    path = f"{folder.format(tmp=tmp_path)}/a.tar"
    write(path, sample())
    with pytest.raises(ShardError), ShardWriter(path) as shard:
        write_twice(shard, sample(1))
    (actual,) = read_shard(path)
    assert_same(actual, sample())
    files, root = fsspec.core.url_to_fs(folder.format(tmp=tmp_path))
    assert len(files.ls(root)) == 1


def test_full_disk_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"before")

    def fail(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"after")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sample()._replace(key="a.b"), "a.b: expected a key of up to 80"),
        (sample()._replace(key=""), "expected a key of up to 80"),
        (
            sample()._replace(latent=torch.zeros(16, 1, 4, 6)),
            r"expected a latent \[16, 2, 4, 6\] .* got \[16, 1, 4, 6\]",
        ),
        (sample(dtype=torch.float64), "in float16 or bfloat16, got .* torch.float64"),
        (sample()._replace(latent=torch.full((16, 2, 4, 6), 1e6)), "clip-0000: expected finite latents"),
        (sample(frames=4), r"expected 1 \+ a multiple of 4, got 4"),
        (sample(height="32"), "meta height: expected int, got '32'"),
        (sample(rate="fast"), "meta rate: expected a positive fraction as text, got 'fast'"),
        (sample(rate="1/0"), "meta rate: expected a positive fraction"),
        (sample(width=0), "expected positive sides"),
        (sample(first_frame=-1), "first_frame >= 0"),
        (sample(prompt="a rabbit"), "expected meta with the keys"),
    ],
)
def test_writer_refuses_what_the_reader_would(tmp_path: Path, wrong: Sample, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        write(tmp_path / "a.tar", wrong)
    assert not list(tmp_path.iterdir())


def test_key_occurs_once(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="clip-0000: expected keys that occur once"):
        write(tmp_path / "a.tar", sample(), sample(1), sample())


def test_missing_shard_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_shard(tmp_path / "none.tar"))


@pytest.mark.parametrize("size", [0, 100, 700, -12000])
def test_truncated_shard_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.tar"
    write(path, sample(0), sample(1))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=r"a\.tar: "):
        list(read_shard(path))


def test_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar " * 200)
    with pytest.raises(ShardError, match="expected a whole tar"):
        list(read_shard(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip-0001.json": None}, "clip-0001: expected a member clip-0001.json, found none"),
        ({"clip-0001.safetensors": None}, "clip-0001: expected a member clip-0001.safetensors"),
        ({"clip-0001.json": b"{"}, "clip-0001: expected safetensors and JSON"),
        ({"clip-0001.json": b"[]"}, "clip-0001: expected meta with the keys .* got list"),
        ({"clip-0001.safetensors": b"12345678"}, "clip-0001: expected safetensors and JSON"),
        (
            {"clip-0001.safetensors": save({"x": torch.zeros(1)})},
            r"clip-0001: expected one tensor, latent, got \['x'\]",
        ),
        (members(sample(1), width=56), r"clip-0001: expected a latent \[16, 2, 4, 7\]"),
    ],
)
def test_reader_names_the_wrong_sample(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    stored = members(sample(0)) | members(sample(1)) | change
    write_members(tmp_path / "a.tar", {name: data for name, data in stored.items() if data is not None})
    samples = read_shard(tmp_path / "a.tar")
    assert_same(next(samples), sample(0))
    with pytest.raises(ShardError, match=message):
        next(samples)


def test_rate_is_exact(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", sample())
    (actual,) = read_shard(tmp_path / "a.tar")
    assert Fraction(actual.meta["rate"]) == Fraction(30000, 1001)
