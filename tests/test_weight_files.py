"""Weights on disk: every layout that tools leave is read or refused in one line, and a save is the same each time."""

import json
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5kernels.weight_files import TRANSFORMER, VAE, WeightsError, open_weights, write_weights

CONFIG = {"width": 3}
TENSORS = {
    "blocks.0.bias": torch.tensor([1.0, 2.0]),
    "blocks.0.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
}
WHOLE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")


def read(path, part=TRANSFORMER, expected=TENSORS):
    return dict(open_weights(path, part).read({name: torch.empty_like(t) for name, t in expected.items()}))


def store(path, tensors=TENSORS, config=CONFIG):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"} if config is None else {"config": json.dumps(config)})
    return path


def store_folder(folder, *names, config=CONFIG):
    """A folder of diffusers with the same tensors in each of the files named."""
    for name in names:
        store(folder / name, config=None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def store_shards(folder):
    for shard, (name, tensor) in zip(SHARDS, TENSORS.items(), strict=True):
        store(folder / shard, {name: tensor}, None)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = {"weight_map": dict(zip(TENSORS, SHARDS, strict=True))}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def refused(words, path, **arguments):
    with pytest.raises(WeightsError, match=words) as caught:
        read(path, **arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def assert_is_read(path, part=TRANSFORMER):
    torch.testing.assert_close(read(path, part), TENSORS, rtol=0, atol=0)


def test_a_file_with_its_config_in_the_metadata_is_read(tmp_path):
    path = store(tmp_path / "model.safetensors")
    assert_is_read(path)
    assert open_weights(path, TRANSFORMER).config == CONFIG


def test_a_file_out_of_a_folder_is_read_with_the_config_beside_it(tmp_path):
    assert_is_read(store_folder(tmp_path, WHOLE) / WHOLE)


@pytest.mark.parametrize("name", [WHOLE, WHOLE.replace(".safetensors", ".fp16.safetensors")])
def test_a_folder_of_diffusers_is_read_also_where_it_has_a_variant_only(tmp_path, name):
    assert_is_read(store_folder(tmp_path, name))


def test_a_folder_with_a_variant_beside_the_whole_weights_gives_the_whole_ones(tmp_path):
    folder = store_folder(tmp_path, WHOLE)
    store(folder / WHOLE.replace(".safetensors", ".fp16.safetensors"), {"other": torch.zeros(1)}, None)
    assert_is_read(folder)


def test_shards_are_read_by_their_index(tmp_path):
    assert_is_read(store_shards(tmp_path))


def test_shards_of_a_variant_are_read(tmp_path):
    folder = store_shards(tmp_path)
    named = {name: name.replace(".safetensors", ".fp16.safetensors") for name in SHARDS}
    for before, after in named.items():
        (folder / before).rename(folder / after)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: named[shard] for name, shard in index["weight_map"].items()}
    (folder / INDEX).unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert_is_read(folder)


@pytest.mark.parametrize("part", [TRANSFORMER, VAE], ids=lambda part: part.name)
def test_a_pipeline_gives_its_part(tmp_path, part):
    (tmp_path / "model_index.json").write_text("{}")
    store_folder(tmp_path / part.name, WHOLE)
    assert_is_read(tmp_path, part)
    (tmp_path / part.name).rename(tmp_path / "elsewhere")
    refused(f"a pipeline without a folder {part.name}", tmp_path, part=part)


@pytest.mark.parametrize(
    ("part", "prefix"),
    [
        (TRANSFORMER, "model.diffusion_model."),
        (TRANSFORMER, "transformer."),
        (TRANSFORMER, "module."),
        (TRANSFORMER, "_orig_mod."),
        (TRANSFORMER, "module._orig_mod."),
        (TRANSFORMER, "module.transformer."),
        (TRANSFORMER, "_fsdp_wrapped_module."),
        (VAE, "vae."),
        (VAE, "first_stage_model."),
        (VAE, "first_stage_model.module."),
        (VAE, "_orig_mod."),
    ],
)
def test_what_tools_put_before_the_names_is_taken_off(tmp_path, part, prefix):
    assert_is_read(store(tmp_path / "m.safetensors", {prefix + name: t for name, t in TENSORS.items()}), part)


def test_a_compiled_block_inside_a_model_is_read(tmp_path):
    tensors = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in TENSORS.items()}
    assert_is_read(store(tmp_path / "m.safetensors", tensors))


def test_a_file_of_several_models_gives_the_one_asked_for(tmp_path):
    others = {"cond_stage_model.x": torch.zeros(1), "first_stage_model.x": torch.zeros(1)}
    tensors = others | {f"model.diffusion_model.{name}": t for name, t in TENSORS.items()}
    assert_is_read(store(tmp_path / "m.safetensors", tensors))


def test_a_file_that_holds_the_model_twice_is_refused(tmp_path):
    twice = TENSORS | {f"transformer.{name}": t.clone() for name, t in TENSORS.items()}
    refused("more than once, its names after `` and `transformer.`", store(tmp_path / "a.safetensors", twice))
    twice = TENSORS | {f"module.{name}": t.clone() for name, t in TENSORS.items()}
    refused(r"blocks\.0\.bias is stored twice", store(tmp_path / "b.safetensors", twice))


def test_names_outside_the_prefix_that_belong_to_no_known_model_are_refused(tmp_path):
    tensors = {f"transformer.{name}": t for name, t in TENSORS.items()} | {"head.weight": torch.zeros(1)}
    refused(r"1 unexpected \(head\.weight\)", store(tmp_path / "m.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_floating_dtype_also_mixed_is_read_in_the_dtype_asked_for(tmp_path, dtype):
    path = store(tmp_path / "m.safetensors", TENSORS | {"blocks.0.weight": TENSORS["blocks.0.weight"].to(dtype)})
    assert_is_read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.bias": None}, r"expected the transformer of its config: 1 missing \(blocks\.0\.bias\)"),
        ({"more": torch.zeros(1)}, r"0 missing; 1 unexpected \(more\)"),
        ({"blocks.0.bias": torch.zeros(3)}, r"blocks\.0\.bias: the config asks for \[2\], the file has \[3\]"),
        ({"blocks.0.bias": torch.tensor([1, 2], dtype=torch.int8)}, r"blocks\.0\.bias: stored as I8; quantized"),
        ({"blocks.0.bias": torch.tensor([True, False])}, r"blocks\.0\.bias: stored as BOOL; quantized"),
        ({"blocks.0.weight_scale": torch.ones(2)}, r"blocks\.0\.weight_scale: a scale of quantized weights"),
        ({"blocks.0.bias": torch.tensor([1.0, torch.nan])}, r"blocks\.0\.bias: holds NaN or infinite values"),
        ({"blocks.0.bias": torch.tensor([1.0, -torch.inf])}, r"blocks\.0\.bias: holds NaN or infinite values"),
        ({"blocks.0.bias": torch.tensor([1.0, 1e300]).double()}, r"infinite values in torch\.float32"),
        ({"blocks.0.lora_A.weight": torch.zeros(1)}, r"an adapter \(blocks\.0\.lora_A\.weight\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, words):
    tensors = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    refused(words, store(tmp_path / "m.safetensors", tensors))


def test_names_that_begin_otherwise_may_be_left_out(tmp_path):
    stored = open_weights(store(tmp_path / "m.safetensors", TENSORS | {"decoder.x": torch.zeros(1)}), VAE)
    assert set(dict(stored.read(TENSORS, within=("blocks.",)))) == set(TENSORS)


def pickled(path):
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))


def zipped(path):
    torch.save(TENSORS, path)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("m.ckpt", pickled, "a pickle, which can run code.*convert it"),
        ("m.pt", zipped, "a pickle, which can run code.*convert it"),
        ("m.safetensors", zipped, "a pickle, which can run code.*convert it"),
        ("m.bin", lambda path: path.write_bytes(b""), "a pickle"),
        ("m.gguf", lambda path: path.write_bytes(b"GGUF" + bytes(99)), "a GGUF file.*give the safetensors weights"),
        ("m.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        ("m.safetensors", lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        ("m.safetensors", lambda path: path.write_text("<html>Not found</html>"), "not a whole safetensors file"),
        ("m.safetensors", lambda path: path.write_bytes((2**62).to_bytes(8, "little")), "not a whole safetensors file"),
        ("config.json", lambda path: path.write_text("{}"), "give the folder this file is in"),
        ("m.safetensors", lambda path: None, "no such file"),
        ("m.safetensors", os.mkfifo, "a device or a pipe"),
        (SHARDS[0], store, "one of several shards; give the folder"),
        ("m.safetensors", lambda path: store(path, config=None), "no config: expected `config` in the metadata"),
        ("m.safetensors", lambda path: store(path, config=[1]), "expected a JSON object, got list"),
    ],
)
def test_what_is_no_whole_safetensors_file_is_refused_with_what_to_do(tmp_path, name, write, words):
    write(tmp_path / name)
    refused(words, tmp_path / name)


@pytest.mark.parametrize("cut", [1, 7, 8, 20, 200, -1])
def test_a_cut_file_is_refused(tmp_path, cut):
    path = store(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    refused("not a whole safetensors file", path)


@pytest.mark.parametrize("text", ["{", '{"a": 1', "[" * 100_000, "\ud800", "1" * 10_000, ""])
def test_a_config_that_is_no_json_is_refused(tmp_path, text):
    folder = store_folder(tmp_path, WHOLE)
    (folder / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    refused(r"config\.json: (not JSON|expected a JSON object)", folder)


def without_a_shard(folder):
    (store_shards(folder) / SHARDS[1]).unlink()


def index_that_leaves_the_folder(folder):
    index = {"weight_map": dict.fromkeys(TENSORS, f"../{folder.name}/{SHARDS[0]}")}
    (store_shards(folder) / INDEX).write_text(json.dumps(index))


def two_variants(folder):
    store_folder(folder, *(WHOLE.replace(".safetensors", f".{name}.safetensors") for name in ("bf16", "fp16")))


def touch(*names):
    def write(folder):
        for name in names:
            (folder / name).write_bytes(b"x")

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: None, r"expected config\.json and diffusion_pytorch_model\.safetensors, found nothing"),
        (touch("a.txt", "b.txt"), r"found a\.txt, b\.txt; is it another folder"),
        (touch("config.json", "diffusion_pytorch_model.bin"), r"diffusion_pytorch_model\.bin is a pickle"),
        (touch("adapter_config.json", "adapter_model.safetensors"), "an adapter"),
        (touch("pytorch_lora_weights.safetensors"), "an adapter"),
        (touch("config.json", SHARDS[0]), r"a shard .* without diffusion_pytorch_model\.safetensors\.index\.json"),
        (lambda folder: store(folder / WHOLE, config=None), "no config"),
        (without_a_shard, rf"1 shards missing \({SHARDS[1]}\)"),
        (index_that_leaves_the_folder, "expected a weight_map to names of shards in its folder"),
        (lambda folder: (store_shards(folder) / INDEX).write_text("{}"), "expected a weight_map"),
        (
            lambda folder: (store_shards(folder) / INDEX).write_text('{"weight_map": {"a": []}}'),
            "expected a weight_map",
        ),
        (lambda folder: store(store_shards(folder) / WHOLE), "expected the weights once, found"),
        (two_variants, r"expected the weights once, found .*bf16.* and .*fp16"),
    ],
)
def test_folders_without_one_whole_model_are_refused_with_what_to_do(tmp_path, write, words):
    write(tmp_path)
    refused(words, tmp_path)


def test_a_file_that_may_not_be_read_is_told_so(tmp_path, monkeypatch):
    path = store(tmp_path / "m.safetensors")

    def denied(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(PermissionError, match=r"m\.safetensors"):
        read(path)


@pytest.mark.parametrize("layers", [3, 10**12])
def test_a_config_that_asks_for_more_layers_than_are_stored_builds_nothing(tmp_path, layers):
    stored = open_weights(store(tmp_path / "m.safetensors"), TRANSFORMER)
    with pytest.raises(WeightsError, match=f"the config asks for {layers} layers, 2 tensors are stored"):
        stored.build(lambda: pytest.fail("built"), layers)


@pytest.mark.parametrize("width", [2**40, 2**70, -1, 1.5])
def test_a_config_of_sizes_that_cannot_be_is_refused(tmp_path, width):
    stored = open_weights(store(tmp_path / "m.safetensors"), TRANSFORMER)
    with pytest.raises(WeightsError, match="no model that can be built") as caught:
        stored.build(lambda: torch.nn.Linear(width, width), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_what_was_written_is_read_by_safetensors(tmp_path, dtype):
    tensors = TENSORS | {
        "scalar": torch.tensor(0.5),
        "none": torch.zeros(0, 3),
        "strided": torch.arange(6.0).view(2, 3).T,
        "half": torch.ones(3).bfloat16(),
        "wide": torch.ones(2).double(),
        "eight": torch.ones(5).to(torch.float8_e5m2),
    }
    write_weights(tmp_path / "m.safetensors", tensors, CONFIG, dtype)
    loaded = load_file(tmp_path / "m.safetensors")
    torch.testing.assert_close(loaded, {n: t.to(dtype or t.dtype) for n, t in tensors.items()}, rtol=0, atol=0)
    assert open_weights(tmp_path / "m.safetensors", TRANSFORMER).config == CONFIG


def test_the_same_weights_give_the_same_bytes_in_any_process(tmp_path):
    code = (
        "import sys, torch; from k5kernels.weight_files import write_weights; "
        "write_weights(sys.argv[1], {name: torch.ones(3) for name in sys.argv[2]}, {'b': 1, 'a': 2}, None)"
    )
    write_weights(tmp_path / "one", {name: torch.ones(3) for name in "abcdef"}, {"b": 1, "a": 2}, None)
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "two", "fedcba"], check=True, env=environment)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_weights_that_are_not_finite_as_stored_are_not_written(tmp_path, bad):
    tensors = TENSORS | {"blocks.0.bias": torch.tensor([1.0, bad])}
    with pytest.raises(ValueError, match=r"blocks\.0\.bias: expected finite weights in torch\.float16"):
        write_weights(tmp_path / "m.safetensors", tensors, CONFIG, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_integers_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"n: expected a floating-point dtype, got torch\.int64"):
        write_weights(tmp_path / "m.safetensors", {"n": torch.ones(1, dtype=torch.int64)}, CONFIG, None)


def test_a_write_that_breaks_off_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "m.safetensors"
    write_weights(path, TENSORS, CONFIG, None)
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*m\.safetensors'"):
            write_weights(path, TENSORS, CONFIG, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
