"""A folder as people have them, encoded: every format that opens, links, and what is left out."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from encoding_jobs import CountingEncoder, shards

from k5kernels.latents.job import encode_videos
from tests.latents.video.containers import Container, still, write_container

VIDEO = Container(128, 128, 6)
FORMATS = {
    "v.gif": replace(VIDEO, codec="gif", pixels="bgr8", rate=Fraction(20)),
    "v.wmv": replace(VIDEO, codec="wmv2"),
    "v.flv": replace(VIDEO, codec="flv"),
    "v.3gp": replace(VIDEO, codec="mpeg4"),
    "v.ogv": replace(VIDEO, codec="libvpx", format="ogg"),
    "v.mxf": replace(VIDEO, codec="mpeg2video", rate=Fraction(25)),
    "v.m2ts": VIDEO,
    "v.y4m": replace(VIDEO, codec="wrapped_avframe"),
    "v.mp4": VIDEO,
    "no suffix": replace(VIDEO, format="matroska"),
    "p.webp": still("libwebp", "bgra", height=128, width=128),
    "p.jpg": still("mjpeg", "yuvj420p", height=128, width=128, full_range=True),
    "p.png": still("png", "rgba", height=128, width=128),
}


def test_everything_that_opens_is_encoded_and_the_rest_is_told(tmp_path: Path) -> None:
    folder, linked = tmp_path / "videos", tmp_path / "elsewhere"
    for path in (folder, linked):
        path.mkdir()
    for name, container in FORMATS.items():
        write_container(folder / name, replace(container, format=container.format or None))
    write_container(linked / "far.mp4", replace(VIDEO, first_frame=5))
    (folder / "link").symlink_to(linked)
    (linked / "back").symlink_to(folder)
    (folder / "broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "notes.txt").write_text("not a video")
    (folder / "odd.dat").write_bytes(bytes(1000))
    write_container(folder / "anim.webp", replace(VIDEO, codec="libwebp_anim", pixels="bgra"))

    summary = encode_videos([folder], CountingEncoder(), tmp_path / "out", clip_frames=5)

    samples = [sample for shard in shards(tmp_path / "out") for sample in shard]
    assert sorted(sample.record.source for sample in samples) == sorted([*FORMATS, "link/far.mp4"])
    assert {sample.record.source for sample in samples if sample.record.rate is None} == {"p.webp", "p.jpg", "p.png"}
    assert all(sample.record.rate in (24, None) for sample in samples)
    failed = {Path(path).name: line for path, line in summary.failures.items()}
    assert set(failed) == {"broken.mp4", "anim.webp"}
    assert "animated WebP" in failed["anim.webp"]
    assert {Path(path).name for path in summary.left_out} >= {"odd.dat"}
    assert summary.others == {".txt": 1}


def test_image_stages_take_frames_one_by_one(tmp_path: Path) -> None:
    write_container(tmp_path / "v.mp4", replace(VIDEO, frames=3))
    write_container(tmp_path / "p.png", FORMATS["p.png"])
    paths = [tmp_path / "v.mp4", tmp_path / "p.png"]
    encode_videos(paths, CountingEncoder(), tmp_path / "out", clip_frames=1)
    samples = [sample for shard in shards(tmp_path / "out") for sample in shard]
    assert [(one.record.source, one.record.first_frame, one.record.rate) for one in samples] == [
        ("p.png", 0, None),
        ("v.mp4", 0, 24),
        ("v.mp4", 1, 24),
        ("v.mp4", 2, 24),
    ]
    assert all(sample.latent.shape[1] == 1 for sample in samples)
