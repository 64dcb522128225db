"""VAE weights: what is saved loads again, diffusers' folders load, wrong files say what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file, save_file
from torch import nn
from vae_models import CONFIG, diffusers_vae

from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.weights import load_decoder, load_encoder, save_vae
from k5kernels.weight_files import WeightsError

LOADERS = (load_encoder, load_decoder)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLHunyuanVideo:
    return diffusers_vae()


@pytest.fixture(scope="module")
def folder(vae: AutoencoderKLHunyuanVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released")
    vae.save_pretrained(path)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "vae.safetensors"
    save_vae(path, HunyuanEncoder(CONFIG), HunyuanDecoder(CONFIG))
    return path


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def rewrite(path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Change the file's configuration and tensors; None removes one."""
    state = {name: t for name, t in (load_file(path) | tensors).items() if t is not None}
    settings = {"block_out_channels": list(CONFIG.widths), "norm_num_groups": CONFIG.groups} | (config or {})
    save_file(state, path, {"config": json.dumps(settings)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_weights_load_as_float32_of_what_was_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    config = VAEConfig(widths=(8, 16, 8, 24), groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.7)
    encoder, decoder = HunyuanEncoder(config), HunyuanDecoder(config)
    save_vae(tmp_path / "vae.safetensors", encoder, decoder, dtype)
    for load, model in zip(LOADERS, (encoder, decoder), strict=True):
        loaded = load(tmp_path / "vae.safetensors")
        assert loaded.config == config
        assert not loaded.training
        assert_same_weights(loaded, model.to(dtype).float())
    assert {t.dtype for t in load_file(tmp_path / "vae.safetensors").values()} == {dtype}


def test_diffusers_folder_loads(vae: AutoencoderKLHunyuanVideo, folder: Path) -> None:
    encoder, decoder = load_encoder(folder), load_decoder(folder)
    assert encoder.config == decoder.config == CONFIG
    assert_same_weights(encoder.conv_in, vae.encoder.conv_in)
    assert_same_weights(encoder.quant_conv, vae.quant_conv)
    assert_same_weights(decoder.conv_out, vae.decoder.conv_out)
    assert_same_weights(decoder.post_quant_conv, vae.post_quant_conv)


def test_half_precision_diffusers_folder_loads_as_float32(tmp_path: Path) -> None:
    diffusers_vae().half().save_pretrained(tmp_path)
    assert {t.dtype for t in load_encoder(tmp_path).state_dict().values()} == {torch.float32}


def test_saved_file_is_a_diffusers_vae_once_its_configuration_stands_beside_it(
    vae: AutoencoderKLHunyuanVideo, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_vae(path, load_encoder(folder), load_decoder(folder), torch.float32)
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    (tmp_path / "config.json").write_text(json.loads(header[8 : 8 + length])["__metadata__"]["config"])
    assert_same_weights(AutoencoderKLHunyuanVideo.from_pretrained(tmp_path), vae)


def test_loaded_weights_are_channels_last_as_convolutions_need_them(saved: Path) -> None:
    assert load_encoder(saved).conv_in.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    before = torch.get_rng_state()
    load_encoder(saved)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_file_is_refused(saved: Path, load: Any, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(saved)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nope: no such file; expected a safetensors file or a folder"):
        load_encoder(tmp_path / "nope")
    with pytest.raises(
        ValueError, match=r"expected config\.json and diffusion_pytorch_model\.safetensors, found nothing"
    ):
        load_encoder(tmp_path)


def test_folder_without_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ValueError, match=r"no config: expected `config` in the metadata.* or config\.json"):
        load_encoder(tmp_path)


def test_file_without_configuration_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no config: expected `config` in the metadata"):
        load_encoder(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "_class_name = AutoencoderKLHunyuanVideo.*got AutoencoderKLWan"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio = 4.*got 8"),
        ({"block_out_channels": [16, 32]}, "expected four positive multiples"),
        ({"block_out_channels": 16}, "expected a VAE configuration"),
        ({"scaling_factor": "large"}, "expected a VAE configuration"),
        ({"layers_per_block": 3}, "32 missing"),
        ({"layers_per_block": 1}, "32 unexpected"),
        ({"block_out_channels": [16, 32, 64, 56]}, r"the config asks for \[56.*the file has \[48"),
    ],
)
def test_configuration_of_another_model_is_refused(saved: Path, config: dict[str, Any], message: str) -> None:
    rewrite(saved, config)
    with pytest.raises(ValueError, match=message):
        load_encoder(saved)


def test_tensors_of_another_model_are_refused(saved: Path) -> None:
    rewrite(saved, **{"encoder.conv_in.conv.bias": None})
    with pytest.raises(ValueError, match=r"1 missing \(encoder\.conv_in\.conv\.bias\)"):
        load_encoder(saved)
    load_decoder(saved)
    rewrite(saved, **{"encoder.conv_in.conv.bias": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.conv\.bias: stored as I64; quantized weights"):
        load_encoder(saved)


def test_weights_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    encoder, decoder = HunyuanEncoder(CONFIG), HunyuanDecoder(CONFIG)
    with torch.no_grad():
        encoder.conv_in.conv.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.conv\.bias: expected finite weights"):
        save_vae(tmp_path / "vae.safetensors", encoder, decoder)
    save_vae(tmp_path / "vae.safetensors", encoder, decoder, torch.float32)


def test_halves_of_two_vaes_and_odd_dtypes_are_refused(tmp_path: Path) -> None:
    decoder = HunyuanDecoder(CONFIG)
    with pytest.raises(ValueError, match="encoder and decoder of one VAE"):
        save_vae(tmp_path / "x", HunyuanEncoder(VAEConfig(widths=(8, 8, 8, 8), groups=8)), decoder)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        save_vae(tmp_path / "x", HunyuanEncoder(CONFIG), decoder, torch.int8)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", "module."])
def test_names_with_a_prefix_load(saved: Path, load: Any, prefix: str) -> None:
    expected = load(saved)
    tensors = load_file(saved)
    rewrite(saved, **dict.fromkeys(tensors), **{prefix + name: tensor for name, tensor in tensors.items()})
    assert_same_weights(load(saved), expected)


@pytest.mark.parametrize("load", LOADERS)
def test_pipeline_and_shards_load(tmp_path: Path, load: Any) -> None:
    diffusers_vae().save_pretrained(tmp_path / "pipeline" / "vae", max_shard_size="200KB")
    diffusers_vae().save_pretrained(tmp_path / "vae")
    assert len(list((tmp_path / "pipeline" / "vae").glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path / "pipeline"), load(tmp_path / "vae"))


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 10**12},
        {"block_out_channels": [2**60] * 4},
        {"block_out_channels": [16.0, 32.0, 64.0, 48.0]},
        {"norm_num_groups": float("inf")},
        {"scaling_factor": float("nan")},
        {"scaling_factor": 0},
        {"latent_channels": None},
    ],
)
def test_configuration_of_no_sizes_is_refused_in_one_line(saved: Path, config: dict[str, Any]) -> None:
    rewrite(saved, config)
    with pytest.raises(WeightsError) as caught:
        load_encoder(saved)
    assert str(caught.value).startswith(f"{saved}: ")
    assert "\n" not in str(caught.value)


def test_sizes_that_no_memory_holds_are_refused_before_any_is_taken(saved: Path) -> None:
    rewrite(saved, {"block_out_channels": [width * 2**20 for width in CONFIG.widths]})
    with pytest.raises(WeightsError, match="the config asks for"):
        load_encoder(saved)


def test_one_vae_saved_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save_vae(tmp_path / "again", load_encoder(saved), load_decoder(saved))
    assert saved.read_bytes() == (tmp_path / "again").read_bytes()
