"""Pictures go through the encoder in batches that follow from the samples of their shard alone.

The encoder of these tests gives a picture other latents in every other batch, so that a shard shows how its pictures
were together. White pictures have no finite latents; of a batch with a black one nothing comes at all.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding_jobs import CountingEncoder, contents, make_video, shards
from PIL import Image
from torch import Tensor

from k5kernels.latents import pictures
from k5kernels.latents.encoders import latent, most_together
from k5kernels.latents.job import EncodeSummary, encode_videos
from k5kernels.latents.video import to_model
from k5kernels.vae import HunyuanEncoder, VAEConfig

SQUARE, WIDE = (64, 64), (64, 128)
BLACK, WHITE = 0, 255
Encode = Callable[..., EncodeSummary]


class MixingEncoder(CountingEncoder):
    """batches: how many pictures of which size went through together. stop: at this call the program is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []
        self.stop: int | None = None
        self.takes_black = False

    def forward(self, video: Tensor) -> Tensor:
        if self.stop == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append((len(video), video.shape[-1]))
        mean = super().forward(video)
        lightness = video.mean((1, 2, 3, 4))
        if lightness.min() < -0.99 and not self.takes_black:
            raise ValueError("a kernel that takes no black")
        mean = mean + mean.mean(0, keepdim=True)
        mean[lightness > 0.99] = torch.inf
        return mean


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> MixingEncoder:
    """Four square pictures are a batch, or two wide ones."""
    monkeypatch.setattr(pictures, "BATCH_PIXELS", 4 * 64 * 64)
    return MixingEncoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirteen pictures, every third one wide, and a video between them."""
    for number in range(13):
        write_picture(tmp_path / "in" / f"{number:02d}.png", WIDE if number % 3 == 2 else SQUARE, number)
    make_video(tmp_path / "in" / "06b.mp4", 3)
    return tmp_path / "in"


@pytest.fixture
def encode(folder: Path, tmp_path: Path, encoder: MixingEncoder) -> Encode:
    def run(out: str = "out", **settings: Any) -> EncodeSummary:
        encoder.batches.clear()
        defaults = {"resolution": (SQUARE, WIDE), "clip_frames": 1, "samples_per_shard": 8}
        return encode_videos([folder], encoder, tmp_path / out, **defaults | settings)

    return run


def write_picture(path: Path, size: tuple[int, int], seed: int, level: int | None = None) -> None:
    """Of noise, or of one level."""
    path.parent.mkdir(exist_ok=True)
    noise = torch.randint(20, 230, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray((noise if level is None else noise.fill_(level)).numpy()).save(path)


def names_of(out: Path) -> list[list[str]]:
    return [[Path(sample.record.source).stem for sample in shard] for shard in shards(out)]


def test_of_each_size_a_shard_has_batches_in_order_and_the_rest(
    encode: Encode, encoder: MixingEncoder, tmp_path: Path
) -> None:
    assert encode() == EncodeSummary(shards=2, samples=16)
    first = ["00", "01", "02", "03", "04", "05", "06", "06b"]
    assert names_of(tmp_path / "out") == [first, ["06b", "06b", "07", "08", "09", "10", "11", "12"]]
    # 00, 01, 03, 04; 02, 05; a frame of the video, which fills the shard; 06. Then two frames; 08, 11; 07, 09, 10, 12.
    video, wide, whole = (1, 64), (2, 128), (4, 64)
    assert encoder.batches == [whole, wide, video, (1, 64), video, video, wide, whole]


@pytest.mark.parametrize("decoders", [1, 3, 8])
def test_the_shards_do_not_depend_on_the_threads(encode: Encode, tmp_path: Path, decoders: int) -> None:
    encode("expected")
    encode(decoders=decoders)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("bad", [None, "05", "09"])
def test_wherever_a_job_is_stopped_it_ends_as_if_it_had_not_been(
    encode: Encode, encoder: MixingEncoder, folder: Path, tmp_path: Path, bad: str | None
) -> None:
    if bad is not None:
        write_picture(folder / f"{bad}.png", WIDE if bad == "05" else SQUARE, 0, WHITE)
    encode("expected")
    for stop in range(len(encoder.batches)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        encoder.stop = stop
        with pytest.raises(KeyboardInterrupt):
            encode()
        encoder.stop = None
        encode()
        assert contents(tmp_path / "out") == contents(tmp_path / "expected"), stop


@pytest.mark.parametrize("stem", ["03", "05", "06", "12"])
def test_a_picture_without_finite_latents_leaves_the_others_as_they_are_without_it(
    encode: Encode, folder: Path, tmp_path: Path, stem: str
) -> None:
    (folder / f"{stem}.png").unlink()
    encode("expected")
    write_picture(folder / f"{stem}.png", WIDE if stem == "05" else SQUARE, 0, WHITE)
    summary = encode()
    why = f"{folder}/{stem}.png: expected clips that are encoded to finite latents, found inf or nan in the one"
    assert summary.failures == {f"{folder}/{stem}.png": f"{why} from frame 0 on"}
    for name in ("00000.tar", "00001.tar"):
        assert contents(tmp_path / "out")[name] == contents(tmp_path / "expected")[name]
    assert encode().failures == summary.failures  # what failed by its content is not tried again
    assert contents(tmp_path / "out")["00001.tar"] == contents(tmp_path / "expected")["00001.tar"]


def test_a_picture_that_stops_its_batch_is_found_and_tried_again_by_the_next_run(
    encode: Encode, encoder: MixingEncoder, folder: Path, tmp_path: Path
) -> None:
    (folder / "03.png").unlink()
    encode("expected")
    write_picture(folder / "03.png", SQUARE, 0, BLACK)
    summary = encode()
    assert summary.failures == {f"{folder}/03.png": f"{folder}/03.png: ValueError: a kernel that takes no black"}
    assert contents(tmp_path / "out")["00000.tar"] == contents(tmp_path / "expected")["00000.tar"]
    encoder.takes_black = True
    assert encode().failures == {}
    assert names_of(tmp_path / "out")[2] == ["03"]
    assert encoder.batches == [(1, 64)]


@pytest.mark.parametrize("name", ["00000.tar", "00001.tar"])
def test_a_shard_is_made_again_as_it_was(encode: Encode, folder: Path, tmp_path: Path, name: str) -> None:
    write_picture(folder / "04.png", SQUARE, 0, WHITE)
    encode()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(before[name][:1000])
    encode()
    assert contents(tmp_path / "out") == before


def test_a_full_shard_of_failing_pictures_goes_on_until_it_is_full(
    encode: Encode, folder: Path, tmp_path: Path
) -> None:
    for number in (0, 1, 3):
        write_picture(folder / f"{number:02d}.png", SQUARE, 0, WHITE)
    assert len(encode().failures) == 3
    assert [len(shard) for shard in shards(tmp_path / "out")] == [8, 5]


def test_the_memory_budget_bounds_a_batch(encode: Encode, encoder: MixingEncoder) -> None:
    encode(memory_budget=encoder.plan((1, 3, 1, *WIDE), "stream").peak_bytes)
    assert set(encoder.batches) == {(1, 64), (2, 64), (1, 128)}


@pytest.mark.parametrize(("clips", "together"), [(None, 3), (3, 3), (2, 2), (1, 1)])
def test_the_budget_says_how_many_go_together_and_the_latents_are_those_of_each_alone(
    clips: int | None, together: int
) -> None:
    torch.manual_seed(0)
    encoder = HunyuanEncoder(VAEConfig(widths=(8, 8, 8, 8), groups=4, layers_per_block=1)).eval()
    one = encoder.plan((1, 3, 1, 16, 24), "stream").peak_bytes
    budget = None if clips is None else clips * one
    assert min(3, most_together(encoder, (1, 16, 24), "stream", budget)) == together
    images = torch.randint(0, 256, (3, 1, 16, 24, 3), dtype=torch.uint8)
    videos = torch.cat([to_model(image) for image in images])
    with torch.inference_mode():
        of_all = latent(encoder, videos, "stream", budget)
        alone = torch.cat([latent(encoder, video[None], "stream", budget) for video in videos])
    torch.testing.assert_close(of_all, alone, rtol=1e-4, atol=1e-5)
