"""The demo: wrong input ends in one line and leaves no results, and a run leaves all that it promises."""

import copy
import json
import shutil
import signal
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import torch
import typer
from full_disk import fill_disk_under, needs_full_disk
from rich.console import Console
from typer.testing import CliRunner

from bench.demo import __main__ as demo
from bench.demo import job, memory
from bench.demo.job import Job
from bench.demo.page import write_page
from bench.demo.report import Table, write_report
from k5kernels.atomic import replacing
from k5kernels.latents.video import write_video
from k5kernels.latents.video.buckets import BUCKETS
from train.clips import CAPTIONS, clip_path

CPU = torch.device("cpu")
SIDE = 128  # pixels of the small jobs' frames
PATHS = ["full attention", "NABLA", "NABLA + MagCache"]
HEADINGS = [
    "Sampling",
    "Which blocks attention reads",
    "MagCache",
    "Encoding and training",
    "Memory",
    "Planner",
]


@pytest.fixture
def invoke(tmp_path):
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


def cut_in_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def without_its_end(path):
    """A video whose index is whole and stands first, so that only reading on finds that the last frames are missing."""
    whole = noise_video(path.with_name("whole.mp4"), 20, 128, 128)
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    return path


def assert_one_clear_line(result, *words: str):
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def assert_no_results(out: Path):
    assert not out.exists() or not any(out.iterdir())


def test_a_missing_file_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(tmp_path / "nothing.mp4"), "nothing.mp4", "No such file")
    assert_no_results(tmp_path / "out")


def test_a_folder_is_one_line(invoke, tmp_path):
    (tmp_path / "clips").mkdir()
    assert_one_clear_line(invoke(tmp_path / "clips"), "clips", "found a folder")
    assert_no_results(tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.mp4", "notes.txt"])
def test_a_text_file_is_one_line(invoke, tmp_path, name):
    path = tmp_path / name
    path.write_text("not a video\n" * 100)
    assert_one_clear_line(invoke(path), name, "video")
    assert_no_results(tmp_path / "out")


def test_a_file_that_cannot_be_opened_is_one_line(invoke, tmp_path, monkeypatch):
    def denied(*arguments, **settings):
        raise PermissionError(13, "Permission denied", str(tmp_path / "clip.mp4"))

    path = noise_video(tmp_path / "clip.mp4", 5, 256, 256)
    monkeypatch.setattr("k5kernels.latents.video.container.av.open", denied)
    assert_one_clear_line(invoke(path), "clip.mp4", "Permission denied")
    assert_no_results(tmp_path / "out")


def test_half_a_file_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(cut_in_half(noise_video(tmp_path / "half.mp4", 9, 256, 256))), "half.mp4")
    assert_no_results(tmp_path / "out")


def test_damage_found_on_the_way_is_one_line(small, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "MAX_CLIPS", 4)
    assert_one_clear_line(invoke(without_its_end(tmp_path / "clip.mp4")), "clip.mp4", "damaged or missing data")
    assert_no_results(tmp_path / "out")


def test_a_single_frame_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(noise_video(tmp_path / "one.mp4", 1, 256, 256)), "one.mp4", "5 frames")


def test_a_video_too_small_is_one_line(invoke, tmp_path):
    assert_one_clear_line(invoke(noise_video(tmp_path / "tiny.mp4", 9, 64, 64)), "tiny.mp4", "64")


def test_a_folder_that_cannot_be_made_is_one_line(invoke, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert_one_clear_line(invoke(noise_video(tmp_path / "clip.mp4", 5, 256, 256)), "out")


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


def make_small(patch: pytest.MonkeyPatch) -> None:
    """The job on few steps and pixels; of its memory, which processes of their own measure, made-up figures."""
    patch.setattr("train.evaluation.PROBES", 1)
    patch.setattr(job, "TRAIN_STEPS", 1)
    patch.setattr(job, "SAMPLE_STEPS", 2)
    patch.setattr(job, "CLIP_FRAMES", 5)
    patch.setattr(job, "MAX_CLIPS", 2)
    patch.setitem(BUCKETS, SIDE, ((SIDE, SIDE),))
    patch.setattr(job, "RESOLUTION", SIDE)
    patch.setattr(job, "measure", lambda grid, device, *flags: 2**30)


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def first_job(tmp_path_factory) -> Job:
    """A small job that has run on a video of more clips than it takes."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        done = Job(noise_video(folder / "noise.mp4", 17, 128, 128), folder / "out", "Noise.", CPU)
        demo.run_steps(done, Console(quiet=True))
    return done


@pytest.fixture
def finished(first_job, small) -> Job:
    """That job, and further ones are as small."""
    return first_job


class Page(HTMLParser):
    """Headings, tables as rows of text, and what the page points to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "h2":
            self.headings.append(data)
        elif self._inside in ("th", "td"):
            self.rows[-1].append(data)

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)


def text_in(value) -> set[str]:
    """The values in nested JSON that are text."""
    if isinstance(value, dict):
        return text_in(list(value.values()))
    if isinstance(value, list):
        return set().union(*map(text_in, value))
    return {value} if isinstance(value, str) else set()


def assert_is_whole_report(out: Path, width: int, height: int, frames: int):
    """Every promised file, and on the page every section, path and model, with nothing fetched from elsewhere."""
    assert sorted(path.name for path in out.iterdir()) == sorted([*job.FILES, job.LATENTS])
    with av.open(str(out / "samples.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (5 * width, height)
        assert sum(1 for _ in container.decode(stream)) == frames
    page = Page(out / "report.html")
    assert page.headings == HEADINGS
    assert len(page.links) == 4
    assert all(link.startswith("data:") for link in page.links)
    results = json.loads((out / "results.json").read_text())
    assert [row["path"] for row in results["sampling"]["paths"]] == PATHS
    for row in results["sampling"]["paths"]:
        shown = page.row(row["path"])
        assert shown[1] == f"{row['time_s']:.1f}"
        assert shown[3] == f"{row['density']:.1%}"
        assert (row["psnr_to_full_attention_db"] is None) == (row["path"] == PATHS[0])
        assert shown[-1] == "–" if row["path"] == PATHS[0] else float(shown[-1]) > 0
    assert text_in(results) == {results["machine"], "cpu", results["clip"]["video"], *PATHS, "video_lite", "video_pro"}
    for model in ("video_lite", "video_pro"):
        assert all(float(cell) > 0 for cell in page.row(model)[1:])


def test_a_run_leaves_a_whole_report(finished):
    assert_is_whole_report(finished.out, SIDE, SIDE, 5)


def test_a_long_video_is_read_only_as_far_as_its_first_clips(finished):
    manifest = json.loads((finished.out / job.LATENTS / "manifest.json").read_text())
    assert [source["clips"] for source in manifest["sources"]] == [2]


@pytest.mark.slow  # the only one that runs the whole job twice
def test_a_second_run_replaces_the_first_and_keeps_other_files(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    former = {name: (out / name).stat().st_mtime_ns for name in job.FILES}
    demo.run(noise_video(tmp_path / "other.mp4", 5, 128, 128), out, "Other noise.", CPU, Console(quiet=True))
    assert all((out / name).stat().st_mtime_ns > former[name] for name in job.FILES)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert_is_whole_report(out, SIDE, SIDE, 5)


def test_a_wrong_video_leaves_a_former_runs_results(finished, invoke, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "notes.mp4").write_text("not a video")
    assert_one_clear_line(invoke(tmp_path / "notes.mp4"), "notes.mp4")
    assert_is_whole_report(out, SIDE, SIDE, 5)


def test_a_run_that_fails_leaves_no_results_of_a_former_one(finished, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "MAX_CLIPS", 4)
    out = shutil.copytree(finished.out, tmp_path / "out")
    assert_one_clear_line(invoke(without_its_end(tmp_path / "clip.mp4")), "clip.mp4", "damaged or missing data")
    assert_no_results(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_is_one_line_and_leaves_no_results(finished, invoke, tmp_path, monkeypatch, number):
    shutil.copytree(finished.out, tmp_path / "out")
    monkeypatch.setattr(Job, "train", lambda *_: signal.raise_signal(number))
    result = invoke(noise_video(tmp_path / "clip.mp4", 5, 128, 128))
    assert result.exit_code == 128 + number
    assert result.stderr == f"demo: stopped by {number.name}; no results of this run are left\n"
    assert_no_results(tmp_path / "out")


def test_a_damaged_video_is_never_shown_as_done(small, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "MAX_CLIPS", 4)
    shown = []
    broken = Job(without_its_end(tmp_path / "clip.mp4"), tmp_path / "out", "Noise.", CPU)
    with pytest.raises(ValueError, match="damaged or missing data"):
        broken.encode(lambda done, total: shown.append((done, total)))
    assert all(done < total for done, total in shown)


@needs_full_disk
@pytest.mark.parametrize("name", job.FILES)
def test_a_full_disk_is_one_line_that_names_the_file(finished, invoke, tmp_path, monkeypatch, name):
    def write(_, console):
        fill_disk_under(name, monkeypatch)
        last = copy.copy(finished)
        last.out = tmp_path / "out"
        last.write_video()
        return write_page(last)

    monkeypatch.setattr(demo, "Job", lambda *arguments: None)
    monkeypatch.setattr(demo, "run_steps", write)
    result = invoke(noise_video(tmp_path / "clip.mp4", 5, 128, 128))
    assert_one_clear_line(result, "No space left on device", name)
    assert_no_results(tmp_path / "out")


def test_a_full_disk_under_the_latents_is_one_line(small, invoke, tmp_path, monkeypatch):
    def full(path, data):
        with replacing(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("k5kernels.folder.write_whole", full)
    result = invoke(noise_video(tmp_path / "clip.mp4", 5, 128, 128))
    assert_one_clear_line(result, "No space left on device", "manifest.json")
    assert_no_results(tmp_path / "out")


def test_a_memory_measurement_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="memory of a training step could not be measured: ended with status 1"):
        memory.measure((1, 8, 8), CPU)


@pytest.mark.slow
def test_the_whole_job_on_the_shipped_clip(tmp_path, monkeypatch):
    # Two of the samplings take minutes at the demo's 50 steps and say no more.
    monkeypatch.setattr(job, "SAMPLE_STEPS", 8)
    demo.run(clip_path("bigbuckbunny"), tmp_path, CAPTIONS["bigbuckbunny"], CPU, Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    training = results["training"]
    assert training["fixed_noise_loss_after"] < training["fixed_noise_loss_before"]
    density = next(row["density"] for row in results["sampling"]["paths"] if row["path"] == "NABLA")
    assert 0.02 < density < 0.9, "NABLA's masks are degenerate"
    assert_is_whole_report(tmp_path, 384, 256, 25)
