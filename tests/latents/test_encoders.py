"""Pictures by the VAE of FLUX: the latents that its models take, and what it does not take is refused."""

from pathlib import Path

import pytest
import torch
from command_line import fails, k5
from diffusers import AutoencoderKL
from encoding_jobs import shards

from k5kernels.latents.encode import Encoding
from k5kernels.latents.encoders import load
from k5kernels.latents.video import read_clips, to_model
from tests.latents.video.containers import still, write_container


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a pipeline with a tiny VAE of FLUX's kind."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        **blocks,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    made = tmp_path_factory.mktemp("flux")
    vae.save_pretrained(made / "vae")
    return made


@pytest.mark.parametrize("below", ["", "vae"])
def test_a_picture_becomes_the_shifted_and_scaled_mean(folder: Path, tmp_path: Path, below: str) -> None:
    picture = write_container(tmp_path / "p.png", still("png", "rgb24", height=128, width=192))
    result = k5(f"encode {picture} --vae {folder / below} --out {tmp_path / 'out'} --preset video_256_images")
    assert result.exit_code == 0, result.output
    ((sample,),) = shards(tmp_path / "out")
    (clip,) = read_clips(picture, 256, 1)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        mean = vae.encode(to_model(clip.frames)[:, :, 0]).latent_dist.mean
    assert torch.equal(sample.latent[:, 0], ((mean[0] - 0.1159) * 0.3611).half())
    assert (sample.record.height, sample.record.width, sample.record.frames) == (256, 384, 1)


def test_it_is_computed_in_the_dtype_that_is_asked_for_which_makes_another_job(folder: Path) -> None:
    cpu = torch.device("cpu")
    settings = [
        Encoding(load(folder, cpu, dtype), clip_frames=1).settings() for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [one["dtype"] for one in settings] == ["float32", "bfloat16"]
    assert settings[0] == Encoding(load(folder / "vae", cpu, torch.float32), clip_frames=1).settings()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--clip-frames 5", "clip_frames: expected 1 with FLUX's VAE, which encodes pictures, got 5"),
        ("--clip-frames 1 --memory-budget 1", "memory_budget: expected none with FLUX's VAE"),
    ],
)
def test_what_it_does_not_take_is_refused(folder: Path, tmp_path: Path, options: str, words: str) -> None:
    fails(f"encode {tmp_path} --vae {folder} --out {tmp_path / 'out'} {options}", 2, words)


def test_a_folder_whose_configuration_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    fails(f"encode {tmp_path} --vae {tmp_path} --out {tmp_path / 'out'}", 2, "config.json")
