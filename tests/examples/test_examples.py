"""The scripts people copy run as they stand, in the order a newcomer would run them."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from k5kernels.latents.video import probe, write_video
from train.clips import load_clip

ROOT = Path(__file__).parents[2]


def run_example(name: str, folder: Path, *arguments: object) -> str:
    """What the script prints, run in `folder` as a user would."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_is_run_here() -> None:
    text = Path(__file__).read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f'"{script.name}"' in text


def test_attention_in_your_dit_keeps_the_videos_shape(tmp_path: Path) -> None:
    printed = run_example("attention_in_your_dit.py", tmp_path)
    assert "[1, 5, 20, 36, 128] -> [1, 5, 20, 36, 128], 3600 tokens in 75 blocks" in printed


@pytest.mark.slow
def test_nabla_in_diffusers_says_how_dense_it_was_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    printed = run_example("nabla_in_diffusers.py", tmp_path)
    assert "attention by nabla: 8 calls" in printed
    assert "density" in printed
    assert "as before afterwards: True" in printed


@pytest.mark.slow
def test_cache_in_diffusers_calibrates_and_then_skips(tmp_path: Path) -> None:
    printed = run_example("cache_in_diffusers.py", tmp_path)
    assert "of 20 passes skipped" in printed
    assert (tmp_path / "ratios.json").is_file()


@pytest.mark.slow
def test_vae_in_diffusers_encodes_and_decodes_in_two_modes(tmp_path: Path) -> None:
    printed = run_example("vae_in_diffusers.py", tmp_path)
    assert "VAE, 1 calls: exact, encoder: 1 x 21 frames of 64 x 96, 1 at once" in printed
    assert "tile: mean error" in printed


def test_cache_in_your_dit_skips_passes_of_both_branches(tmp_path: Path) -> None:
    printed = run_example("cache_in_your_dit.py", tmp_path)
    assert "20 of 40 passes skipped" in printed
    assert "uncond: ####" in printed


def test_plan_cluster_names_a_layout_and_its_rivals(tmp_path: Path) -> None:
    printed = run_example("plan_cluster.py", tmp_path, "--stage", "video_lite_mr_5s", "--gpus", 64)
    assert "shards" in printed.splitlines()[0]
    assert "micro-batch 2: fits" in printed


@pytest.mark.slow
def test_a_folder_of_videos_becomes_latents_that_can_be_trained_on(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "clip.mp4", load_clip("bigbuckbunny", 256)[:5], Fraction(24))
    printed = run_example("encode_a_folder.py", tmp_path, "videos", "--out", "latents")
    assert "1 clips in 1 shards" in printed
    assert "[16, 2, 32, 48]" in printed
    run_example("train_on_your_clips.py", tmp_path, "latents", "--out", "run", "--steps", 2)
    assert (tmp_path / "run" / "crossdit.safetensors").is_file()


@pytest.mark.slow
def test_sample_nano_writes_a_clip(tmp_path: Path) -> None:
    run_example("sample_nano.py", tmp_path, "--frames", 5, "--steps", 4, "--out", "clip.mp4")
    info = probe(tmp_path / "clip.mp4")
    assert (info.height, info.width, info.frames) == (256, 384, 5)
