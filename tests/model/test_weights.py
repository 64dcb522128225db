"""Weights in and out: whole, exact, in the released layout, with clear errors."""

import json
import os

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import load_file, save_file

from model import CrossDiT, CrossDiTConfig
from model.weights import WeightsError, config_from_json, config_to_json, load_crossdit, save_crossdit

CONFIG = CrossDiTConfig(
    model_dim=32,
    time_dim=8,
    ff_dim=48,
    text_blocks=1,
    visual_blocks=2,
    axes_dims=(4, 6, 6),
    in_text_dim=10,
    in_text_dim2=6,
)


@pytest.fixture
def model() -> CrossDiT:
    model = CrossDiT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def rewrite(path, change) -> None:
    """Apply change(state) to the tensors of a saved model and keep its config."""
    state = load_file(path)
    change(state)
    save_file(state, path, {"config": json.dumps(config_to_json(CONFIG))})


def test_what_was_saved_is_loaded_bit_for_bit(model, tmp_path):
    save_crossdit(tmp_path / "model.safetensors", model)
    loaded = load_crossdit(tmp_path / "model.safetensors")
    assert loaded.config == CONFIG
    assert not loaded.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_file_stored_in_bfloat16_is_half_as_large_and_loads_in_float32(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_crossdit(path, model, torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    for name, tensor in load_crossdit(path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


def test_loaded_in_bfloat16_the_modulation_layers_stay_exact(model, tmp_path):
    save_crossdit(tmp_path / "model.safetensors", model)
    loaded = load_crossdit(tmp_path / "model.safetensors", torch.bfloat16)
    name = "visual_transformer_blocks.0.visual_modulation.out_layer.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert loaded.visual_transformer_blocks[0].feed_forward.in_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_of_diffusers_loads(model, tmp_path, shard):
    other = Kandinsky5Transformer3DModel(**config_to_json(CONFIG))
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = load_crossdit(tmp_path)
    assert loaded.config == CONFIG
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_diffusers_loads_what_was_saved(model, tmp_path):
    save_crossdit(tmp_path / "diffusion_pytorch_model.safetensors", model)
    other = Kandinsky5Transformer3DModel.from_config(config_to_json(CONFIG))
    other.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), strict=True)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_config_survives_its_json(tmp_path):
    assert config_from_json(json.loads(json.dumps(config_to_json(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("out_layer.out_layer.bias"), r"1 missing \(out_layer.out_layer.bias\); 0 unexpected"),
        (lambda state: state.update(extra=torch.zeros(1)), r"0 missing; 1 unexpected \(extra\)"),
        (
            lambda state: state.update({"out_layer.out_layer.bias": torch.zeros(3)}),
            r"out_layer.out_layer.bias: the config asks for \[64\], the file has \[3\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(model, tmp_path, change, words):
    path = tmp_path / "model.safetensors"
    save_crossdit(path, model)
    rewrite(path, change)
    with pytest.raises(WeightsError, match=words):
        load_crossdit(path)


def test_a_corrupt_or_cut_file_is_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_crossdit(path, model)
    whole = path.read_bytes()
    for broken in (b"", b"not safetensors at all", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            load_crossdit(path)


def test_a_path_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="no such file; expected a safetensors file"):
        load_crossdit(tmp_path / "nothing.safetensors")
    with pytest.raises(WeightsError, match=r"expected config\.json"):
        load_crossdit(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no config: expected `config` in the metadata"):
        load_crossdit(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "vae.safetensors", {"config": json.dumps({"channels": [8]})})
    with pytest.raises(
        WeightsError,
        match=r"vae\.safetensors: expected the config of a CrossDiT, with model_dim; got that of another model",
    ):
        load_crossdit(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_dim", 32.0),
        ("model_dim", True),
        ("model_dim", "32"),
        ("ff_dim", 0),
        ("ff_dim", 10**30),
        ("num_visual_blocks", 10**12),
        ("num_text_blocks", -1),
        ("num_text_blocks", [1]),
        ("axes_dims", 16),
        ("axes_dims", [4, 6]),
        ("axes_dims", [4.0, 6.0, 6.0]),
        ("patch_size", [1, 2, 0]),
        ("in_text_dim", [10, 10]),
        ("visual_cond", 1),
    ],
)
def test_a_config_of_no_sizes_is_refused_in_one_line(model, tmp_path, name, value):
    path = tmp_path / "model.safetensors"
    save_crossdit(path, model)
    save_file(load_file(path), path, {"config": json.dumps(config_to_json(CONFIG) | {name: value})})
    with pytest.raises(WeightsError) as caught:
        load_crossdit(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_folder_of_another_model_is_named(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match="got that of FluxTransformer2DModel"):
        load_crossdit(tmp_path)


def test_integer_weights_are_refused_by_name(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_crossdit(path, model)
    name = "visual_transformer_blocks.1.feed_forward.in_layer.weight"
    rewrite(path, lambda state: state.update({name: torch.ones_like(state[name], dtype=torch.int8)}))
    with pytest.raises(WeightsError, match=rf"{name}: stored as I8; quantized weights are not read"):
        load_crossdit(path)


def test_one_model_saved_twice_gives_the_same_bytes_and_an_ordinary_mode(model, tmp_path):
    before = os.umask(0o022)
    try:
        save_crossdit(tmp_path / "one", model)
        save_crossdit(tmp_path / "two", load_crossdit(tmp_path / "one"))
    finally:
        os.umask(before)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "two").stat().st_mode & 0o777 == 0o644


def test_a_model_that_is_not_finite_is_not_saved(model, tmp_path):
    with torch.no_grad():
        model.out_layer.out_layer.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"out_layer\.out_layer\.bias: expected finite weights"):
        save_crossdit(tmp_path / "model.safetensors", model)
    assert list(tmp_path.iterdir()) == []
