"""Latent shards: what is written reads back, and a damaged sample is named."""

import io
import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import webdataset
from safetensors.torch import save

from k5kernels.latents.record import ClipRecord, from_json, to_json
from k5kernels.latents.shards import Sample, ShardError, ShardWriter, read_shard

RECORD = ClipRecord(5, 32, 48, Fraction(30000, 1001), "a b.mp4", first_frame=0)


def sample(number: int = 0, dtype: torch.dtype = torch.float16, **fields: Any) -> Sample:
    latent = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
    return Sample(f"clip-{number:04d}", latent, replace(RECORD, first_frame=number, **fields))


def write(path: str | Path, *samples: Sample) -> None:
    with ShardWriter(path) as shard:
        for one in samples:
            shard.write(one)


def write_twice(shard: ShardWriter, one: Sample) -> None:
    shard.write(one)
    shard.write(one)


def write_members(path: Path, members: dict[str, bytes]) -> None:
    """A tar of our own making, to be wrong in ways that the writer refuses."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(one: Sample, **fields: Any) -> dict[str, bytes]:
    text = json.dumps(json.loads(to_json(one.record)) | fields).encode()
    return {f"{one.key}.json": text, f"{one.key}.safetensors": save({"latent": one.latent})}


def assert_same(actual: Sample, expected: Sample) -> None:
    assert (actual.key, actual.record) == (expected.key, expected.record)
    assert actual.latent.dtype == expected.latent.dtype
    assert torch.equal(actual.latent, expected.latent)
    assert set(actual.tensors) == set(expected.tensors)
    assert all(torch.equal(actual.tensors[name], tensor) for name, tensor in expected.tensors.items())


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
    assert from_json(stored[0]["json"]) == sample().record


def test_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.tar", sample(0), sample(1))
    monkeypatch.setattr("time.time", lambda: 2e9)
    write(tmp_path / "b.tar", sample(0), sample(1))
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(sample(), key="a.b"), "a.b: expected a key of up to 80"),
        (replace(sample(), key=""), "expected a key of up to 80"),
        (
            replace(sample(), latent=torch.zeros(16, 1, 4, 6)),
            r"expected a latent \[16, 2, 4, 6\] .* got \[16, 1, 4, 6\]",
        ),
        (sample(dtype=torch.float64), "in float16 or bfloat16, got .* torch.float64"),
        (replace(sample(), latent=torch.full((16, 2, 4, 6), 1e6)), "clip-0000: expected a finite latent"),
        (sample(extra={"prompt": torch}), "clip-0000: extra: expected JSON values"),
        (sample(extra={"score": float("nan")}), "clip-0000: extra: expected JSON values"),
        (replace(sample(), tensors={"text": torch.full((2,), torch.nan)}), "clip-0000: expected a finite text"),
        (replace(sample(), tensors={"text": torch.zeros(2).double()}), "clip-0000: expected text in one of .*float64"),
        (replace(sample(), tensors={"latent": sample().latent}), "expected further tensors of other names"),
        (replace(sample(), tensors={"Text.1": torch.zeros(2)}), "expected tensors latent and others named in lower"),
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


@pytest.mark.parametrize("member", ["clip-0001.json", "clip-0001.safetensors"])
def test_shard_that_ends_where_a_sample_ends_is_refused(tmp_path: Path, member: str) -> None:
    """To tarfile this is the end of the tar: the samples after it would be lost without a word."""
    path = tmp_path / "a.tar"
    write(path, sample(0), sample(1))
    path.write_bytes(path.read_bytes()[: header(path, member)])
    with pytest.raises(ShardError, match=r"a\.tar: expected a whole tar, .*where a member or the end mark should be"):
        list(read_shard(path))


@pytest.mark.parametrize("member", ["clip-0001.json", "clip-0001.safetensors"])
def test_shard_with_a_damaged_header_is_refused(tmp_path: Path, member: str) -> None:
    path = tmp_path / "a.tar"
    write(path, sample(0), sample(1))
    damaged = bytearray(path.read_bytes())
    damaged[header(path, member) + 5] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ShardError, match=r"a\.tar: expected a whole tar, .*bad checksum"):
        list(read_shard(path))


def test_shard_with_zeros_for_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, sample(0), sample(1))
    whole, end = path.read_bytes(), header(path, "clip-0001.json")
    for rest in (bytes(512) + whole[end + 512 :], bytes(1000)):
        path.write_bytes(whole[:end] + rest)
        with pytest.raises(ShardError, match="other data than blocks of zeros after the end mark"):
            list(read_shard(path))


def header(path: Path, member: str) -> int:
    """Where a member begins in a tar."""
    with tarfile.open(path) as tar:
        return tar.getmember(member).offset


def test_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar " * 200)
    with pytest.raises(ShardError, match="expected a whole tar"):
        list(read_shard(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip-0001.json": None}, "clip-0001: expected a member clip-0001.json, found none"),
        ({"clip-0001.safetensors": None}, "clip-0001: expected a member clip-0001.safetensors"),
        ({"clip-0001.json": b"{"}, "clip-0001: expected JSON"),
        ({"clip-0001.json": b"[]"}, "clip-0001: expected a JSON object, got list"),
        ({"clip-0001.safetensors": b"12345678"}, "clip-0001: expected safetensors"),
        (members(replace(sample(1), latent=sample(1).latent * torch.nan)), "clip-0001: expected a finite latent"),
        (
            {"clip-0001.safetensors": save({"x": torch.zeros(1)})},
            r"clip-0001: expected tensors latent and others .* got \['x'\]",
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


def test_reader_refuses_a_key_that_comes_back(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for one in (sample(0), sample(1), sample(0)):
            for name, data in members(one).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ShardError, match=r"a\.tar: clip-0000: expected keys that occur once"):
        list(read_shard(tmp_path / "a.tar"))


def test_further_tensors_travel_with_the_latent(tmp_path: Path) -> None:
    tensors = {"text_embedding": torch.randn(7, 12).bfloat16(), "text_mask": torch.ones(7, dtype=torch.bool)}
    write(tmp_path / "a.tar", replace(sample(), tensors=tensors), sample(1))
    described, plain = read_shard(tmp_path / "a.tar")
    assert_same(described, replace(sample(), tensors=tensors))
    assert_same(plain, sample(1))


def test_shard_from_before_versions_is_read(tmp_path: Path) -> None:
    old = {"frames": 5, "height": 32, "width": 48, "rate": "30000/1001", "source": "a b.mp4", "first_frame": 3}
    latent = save({"latent": sample(3).latent})
    write_members(tmp_path / "a.tar", {"clip-0003.json": json.dumps(old).encode(), "clip-0003.safetensors": latent})
    (actual,) = read_shard(tmp_path / "a.tar")
    assert_same(actual, sample(3))
