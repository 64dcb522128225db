"""The demo: wrong input ends in one line; the whole job writes what it promises (slow)."""

import json
from fractions import Fraction

import av
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench.demo import __main__ as demo
from bench.demo.report import Table, write_report
from k5kernels.video import write_video


@pytest.fixture
def invoke(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(demo.main)

    def run(video):
        return CliRunner().invoke(app, ["--video", str(video), "--out", str(tmp_path / "out")])

    return run


def noise_video(path, frames: int, height: int, width: int):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)
    write_video(path, video, Fraction(25))
    return path


def assert_one_clear_line(result, *words: str):
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_missing_file_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(tmp_path / "nothing.mp4"), "nothing.mp4")


def test_a_file_that_is_no_video_is_one_line(invoke, tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a video")
    assert_one_clear_line(invoke(path), "notes.mp4", "video")


def test_a_single_frame_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(noise_video(tmp_path / "one.mp4", 1, 256, 256)), "one.mp4", "5 frames")


def test_a_video_too_small_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(noise_video(tmp_path / "tiny.mp4", 9, 64, 64)), "tiny.mp4", "64")


def test_a_full_disk_is_one_line(invoke, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("k5kernels.encode.write_whole", full_disk)
    assert_one_clear_line(invoke(noise_video(tmp_path / "clip.mp4", 5, 256, 256)), "No space left on device")


def test_a_table_escapes_what_it_shows():
    page = Table("a < b", ("x & y",), (("<i>",),), "note").html()
    assert "a &lt; b" in page
    assert "x &amp; y" in page
    assert "<i>" not in page


def test_the_page_is_one_file(tmp_path):
    video = noise_video(tmp_path / "clip.mp4", 5, 64, 64)
    write_report(tmp_path / "report.html", "title", "facts", video, "note", [("part", [Table("t", ("c",), (("1",),))])])
    page = (tmp_path / "report.html").read_text()
    assert "data:video/mp4;base64," in page
    assert "http" not in page


@pytest.mark.slow
def test_the_whole_job_on_the_shipped_clip(tmp_path):
    from train.clips import clip_path

    demo.run(clip_path("bigbuckbunny"), tmp_path, demo.CAPTIONS["bigbuckbunny"], Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    values = {name: float(value) for name, value in results["job"]["rows"]}
    assert values["loss after training, same noise"] < values["loss before training, fixed noise"]
    rows = {row[0]: row for row in results["sampling"]["rows"]}
    assert list(rows) == ["full attention", "NABLA", "NABLA + MagCache"]
    density = float(rows["NABLA"][3].rstrip("%"))
    assert 2 < density < 90, "NABLA's masks are degenerate"
    with av.open(str(tmp_path / "samples.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (5 * 384, 256)
        assert sum(1 for _ in container.decode(stream)) == 25
    assert (tmp_path / "report.html").stat().st_size > 100_000
