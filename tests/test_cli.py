"""The `k5` command, run in this process."""

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from k5kernels import planner
from k5kernels.cli import app
from k5kernels.shards import read_shard
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.weights import save_vae
from k5kernels.video import write_video


def k5(command: str, terminal: bool = False) -> Result:
    """terminal: whether stderr passes for one."""
    return CliRunner(env={"COLUMNS": "160", "FORCE_COLOR": "1" if terminal else None}).invoke(app, command.split())


def fails(command: str, exit_code: int, *words: str) -> None:
    """The command ends with that code and those words on stderr, nothing on stdout and no traceback."""
    result = k5(command)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    message = " ".join(re.sub(r"\x1b\[[\d;]*m|│", "", result.stderr).split())
    assert all(word in message for word in words), message
    assert isinstance(result.exception, SystemExit)
    if exit_code == 1:
        assert result.stderr.count("\n") == 1


def test_plan_step_shows_the_terms_and_the_total():
    result = k5("plan step --preset video_lite --pixels 3047424")
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines() if "│" in line]
    assert [(row[0], next(word for word in row if word.endswith(".0"))) for row in rows] == [
        ("tokenwise", "288.0"),
        ("attention", "448.0"),
        ("linear", "192.0"),
        ("total", "928.0"),
    ]


def test_plan_step_as_json_is_the_planners_answer():
    result = k5("plan step --preset video_pro --resolution 512x768 --seconds 10 --batch 2 --json")
    answer = json.loads(result.stdout)
    assert answer["inputs"] == {"model_dim": 4096, "blocks": 60, "pixels": 512 * 768 * 61, "batch": 2}
    assert answer["total_ms"] == planner.step_time_ms(4096, 512 * 768 * 61, 60, 2)
    assert sum(answer["terms"].values()) == answer["total_ms"]


def test_plan_step_by_numbers_is_the_preset_of_those_numbers():
    by_numbers = k5("plan step --model-dim 1792 --blocks 32 --resolution 512x768 --frames 121 --json")
    by_preset = k5("plan step --preset video_lite --resolution 512x768 --seconds 5 --json")
    assert json.loads(by_numbers.stdout) == json.loads(by_preset.stdout)


def test_a_number_changes_the_preset():
    changed = json.loads(k5("plan step --preset video_lite --blocks 64 --pixels 1000000 --json").stdout)
    assert changed["inputs"]["blocks"] == 64
    assert changed["inputs"]["model_dim"] == 1792


def test_plan_memory_shows_the_terms_in_gib():
    result = k5("plan memory --preset video_lite --tokens 93696 --gpus 64")
    assert result.exit_code == 0
    assert {"0.33", "0.11", "10.01", "8.13", "18.47"} <= set(result.stdout.split())


def test_plan_memory_as_json_is_the_planners_answer():
    result = k5("plan memory --preset video_lite --resolution 512x768 --seconds 10 --batch 2 --gpus 64 --json")
    answer = json.loads(result.stdout)
    assert answer["inputs"]["tokens"] == 2 * 93_696
    assert answer["inputs"]["parameters"] == planner.parameters(1792, 512, 7168, 32)
    assert answer["total_bytes"] == planner.memory_bytes(1792, 512, 7168, 32, 2 * 93_696, 64, offload=False)
    assert (
        answer["terms"]["block_inputs_bytes"] + answer["terms"]["block_activations_bytes"]
        == (answer["activations_bytes"])
    )


def test_plan_memory_offload_drops_the_block_inputs():
    answer = json.loads(k5("plan memory --preset video_lite --tokens 93696 --offload --json").stdout)
    assert answer["inputs"]["offload"] is True
    assert answer["terms"]["block_inputs_bytes"] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan step --blocks 32 --pixels 1000", ["--model-dim", "--preset"]),
        ("plan memory --model-dim 64 --tokens 64", ["--time-dim", "--ff-dim", "--blocks"]),
        ("plan step --preset video_lite", ["--resolution", "--frames", "--seconds", "--pixels"]),
        ("plan step --preset video_lite --resolution 512x768", ["--frames", "--seconds"]),
        ("plan step --preset video_lite --resolution 512x768 --frames 5 --seconds 1", ["either", "--frames"]),
        ("plan step --preset video_lite --pixels 1000 --frames 5", ["--pixels", "alone"]),
        ("plan step --preset video_lite --resolution 512 --frames 5", ["HEIGHTxWIDTH", "'512'"]),
        ("plan step --preset video_lite --pixels 0", ["--pixels", "1"]),
        ("plan memory --preset video_lite --tokens 64 --gpus none", ["--gpus", "integer"]),
    ],
)
def test_a_wrong_command_line_says_what_to_give_and_exits_with_2(command, words):
    fails(command, 2, *words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan step --preset lite --pixels 1000", ["preset: expected one of", "video_pro", "'lite'"]),
        ("plan step --preset video_lite --resolution 500x768 --frames 121", ["height", "multiple of 16", "500"]),
        ("plan step --preset video_lite --resolution 512x768 --frames 120", ["frames", "multiple of 4", "120"]),
        ("plan step --preset video_lite --resolution 512x768 --seconds nan", ["seconds", "above 0", "nan"]),
        (f"plan memory --preset video_lite --tokens {10**30}", ["tokens", "2**63", str(10**30)]),
    ],
)
def test_a_value_that_cannot_be_is_one_line_on_stderr_and_exits_with_1(command, words):
    fails(command, 1, *words)


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
    assert sample.meta["source"] == f"{folder}/clip.mp4"
    assert "1 clips in 1 shards" in result.stdout


def test_encode_shows_its_progress_on_a_terminal(folder, tmp_path):
    video = shutil.copy(folder / "clip.mp4", tmp_path / "[x]clip.mp4")
    arguments = f"encode {video} --vae {folder}/vae.safetensors --out {tmp_path}/out"
    assert "[x]clip.mp4" in k5(arguments, terminal=True).stderr
    assert k5(arguments).stderr == ""


def test_encode_keeps_the_good_videos_names_the_bad_one_and_exits_with_1(folder, tmp_path):
    result = k5(f"encode {folder}/text.mp4 {folder}/clip.mp4 --vae {folder}/vae.safetensors --out {tmp_path}/out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"k5: {folder}/text.mp4: ")
    assert result.stderr.count("\n") == 1
    assert len(list(read_shard(tmp_path / "out" / "00000.tar"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{folder}/clip.mp4 --vae {folder}/none --out {out}", ["none", "expected a safetensors file"]),
        ("{folder}/clip.mp4 --vae {folder}/clip.mp4 --out {out}", ["clip.mp4", "expected a whole VAE"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {folder}/text.mp4", ["text.mp4"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {out} --resolution 300", ["resolution", "300"]),
        ("{folder}/clip.mp4 --vae {folder}/vae.safetensors --out {out} --clip-frames 8", ["frames", "8"]),
        ("{out} --vae {folder}/vae.safetensors --out {out}", ["paths", "found none"]),
    ],
)
def test_encode_refuses_what_it_cannot_use_in_one_line(folder, tmp_path, options, words):
    (tmp_path / "videos").mkdir()
    fails("encode " + options.format(folder=folder, out=tmp_path / "videos"), 1, *words)


@pytest.mark.parametrize("options", ["", "clip.mp4 --out out", "clip.mp4 --vae vae", "--vae vae --out out"])
def test_encode_without_what_it_needs_is_a_wrong_command_line(options):
    fails(f"encode {options}", 2, "Missing")
