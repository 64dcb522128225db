"""`k5` and `k5 encode`."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from command_line import fails, k5

from k5kernels.latents.shards import read_shard
from k5kernels.latents.video import write_video
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.weights import save_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small VAE, a video of 9 frames, and a file that is no video."""
    folder = tmp_path_factory.mktemp("encode")
    torch.manual_seed(0)
    config = VAEConfig(widths=(4, 4, 4, 4), groups=2, layers_per_block=1)
    save_vae(folder / "vae.safetensors", HunyuanEncoder(config), HunyuanDecoder(config))
    write_video(folder / "clip.mp4", torch.randint(0, 256, (9, 128, 128, 3), dtype=torch.uint8), Fraction(24))
    (folder / "text.mp4").write_text("not a video")
    return folder


def test_encode_writes_the_clips_of_a_video_into_a_shard(folder, tmp_path):
    result = k5(f"encode {folder}/clip.mp4 --vae {folder}/vae.safetensors --out {tmp_path}/out --clip-frames 5")
    assert result.exit_code == 0, result.output
    (sample,) = read_shard(tmp_path / "out" / "00000.tar")
    assert sample.latent.shape == (16, 2, 32, 32)
    assert sample.record.source == "clip.mp4"
    assert "1 clips in 1 shards" in result.stdout


def test_encode_takes_captions_from_a_file_and_says_at_its_start_how_many_fit(folder, tmp_path):
    (tmp_path / "captions.csv").write_text("path,caption\nclip,A clip of noise.\n")
    arguments = f"encode {folder}/clip.mp4 --vae {folder}/vae.safetensors --out {tmp_path}/out --clip-frames 5"
    result = k5(f"{arguments} --captions {tmp_path}/captions.csv")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (0, "1 of 1 sources have a caption")
    assert "[1/1]" in result.stderr.splitlines()[1]
    (sample,) = read_shard(tmp_path / "out" / "00000.tar")
    assert sample.record.caption == "A clip of noise."


def test_encode_shows_its_progress_on_a_terminal(folder, tmp_path):
    video = shutil.copy(folder / "clip.mp4", tmp_path / "[x]clip.mp4")
    arguments = f"encode {video} --vae {folder}/vae.safetensors --out {tmp_path}/out"
    assert "1/1 [x]clip.mp4" in k5(arguments, terminal=True).stderr


def test_encode_writes_a_line_a_source_where_there_is_no_terminal(folder, tmp_path):
    result = k5(f"encode {folder} --vae {folder}/vae.safetensors --out {tmp_path}/out --clip-frames 5")
    assert [line.split(" (")[0] for line in result.stderr.splitlines()[:3]] == [
        f"[1/2] {folder}/clip.mp4: 1 clips",
        f"[2/2] {folder}/text.mp4: expected a readable video file",
        "left out by their names: 1 .safetensors",
    ]


def test_encode_keeps_the_good_videos_names_the_bad_one_and_exits_with_1(folder, tmp_path):
    result = k5(f"encode {folder}/text.mp4 {folder}/clip.mp4 --vae {folder}/vae.safetensors --out {tmp_path}/out")
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("k5: "))
    assert line.startswith(f"k5: {folder}/text.mp4: ")
    assert len(list(read_shard(tmp_path / "out" / "00000.tar"))) == 1


def test_encode_lists_its_presets_and_needs_nothing_else():
    result = k5("encode --list-presets")
    assert result.exit_code == 0, result.output
    assert all(f" {name} " in result.stdout for name in ("video_lite_512", "image_lite_256", "video_pro_1024_10s"))


def test_encode_takes_a_presets_settings_and_before_them_those_that_are_given(folder, tmp_path):
    arguments = f"encode {folder}/clip.mp4 --vae {folder}/vae.safetensors --preset video_lite_256 --clip-frames 5"
    assert k5(f"{arguments} --out {tmp_path}/out").exit_code == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    expected = {"resolution": 256, "clip_frames": 5, "fps": "24", "samples_per_shard": 16}
    assert settings.items() >= expected.items()
    fails(f"{arguments} --out {tmp_path}/out --samples-per-shard 2", 2, "samples_per_shard 16 there, 2 now")
    fails(f"encode {folder}/clip.mp4 --vae {folder}/vae.safetensors --out {tmp_path} --preset small", 2, "preset")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_computes_in_the_dtype_that_is_asked_for(folder, tmp_path, dtype):
    arguments = f"encode {folder}/clip.mp4 --vae {folder}/vae.safetensors --out {tmp_path}/out --device cpu"
    assert k5(f"{arguments} --dtype {dtype}").exit_code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["dtype"] == dtype
    assert k5(arguments).exit_code == {"float32": 0, "bfloat16": 2}[dtype]
    fails(f"{arguments} --dtype int8", 2, "dtype: expected one of float32, bfloat16, float16, got 'int8'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{folder}/clip.mp4 --vae {folder}/none --out {out}", ["none", "expected a safetensors file"]),
        ("{folder}/clip.mp4 --vae {folder}/clip.mp4 --out {out}", ["clip.mp4", "not a whole safetensors file"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {folder}/text.mp4", ["text.mp4"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {out} --resolution 300", ["resolution", "300"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {out} --clip-frames 8", ["frames", "8"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {out} --index 2 --of 2", ["index", "got 2 of 2"]),
        ("{out} --vae {folder}/vae.safetensors --out {out}", ["paths", "found none"]),
    ],
)
def test_encode_refuses_what_it_cannot_use_in_one_line(folder, tmp_path, options, words):
    (tmp_path / "videos").mkdir()
    fails("encode " + options.format(folder=folder, out=tmp_path / "videos"), 2, *words)


def test_the_package_runs_as_the_command_does():
    module = subprocess.run([sys.executable, "-m", "k5kernels", "encode"], capture_output=True, text=True)
    assert module.returncode == 2
    assert module.stderr.startswith("Usage: k5 encode [OPTIONS]")


@pytest.mark.parametrize("options", ["", "clip.mp4 --out out", "clip.mp4 --vae vae", "--vae vae --out out"])
def test_encode_without_what_it_needs_is_a_wrong_command_line(options):
    fails(f"encode {options}", 2, "Missing")
