"""`python -m train.soup`: weighted averages of models that are alike, and one line where they are not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from full_disk import fill_disk_under, needs_full_disk
from latent_samples import sample
from safetensors.torch import load_file
from small_crossdit import CONFIG, random_model
from tiny_stage import tiny_loop
from typer.testing import CliRunner

from k5kernels.attention import DENSE
from k5kernels.latents.shards import ShardWriter
from k5kernels.text_condition import TextCondition
from model.weights import load_crossdit, save_crossdit
from train import soup
from train.evaluation import probe_loss
from train.latents import LatentSet, read_shards
from train.stored_model import open_model

app = typer.Typer()
app.command()(soup.main)


@pytest.fixture
def models(tmp_path):
    """Three files of the same model with other weights."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        save_crossdit(path, random_model(seed=seed))
    return paths


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("train.soup: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ((), (1 / 3, 1 / 3, 1 / 3)),
        (("--weights", "2,1,1"), (0.5, 0.25, 0.25)),
        (("--weights", "1,0,0"), (1.0, 0.0, 0.0)),
        (("--sizes", "100,400,100"), (0.25, 0.5, 0.25)),
    ],
)
def test_the_soup_is_the_weighted_average(models, tmp_path, options, shares):
    result = invoke(*models, "--out", tmp_path / "soup.safetensors", *options)
    assert result.exit_code == 0, result.output
    states = [load_crossdit(path).state_dict() for path in models]
    for name, tensor in load_crossdit(tmp_path / "soup.safetensors").state_dict().items():
        expected = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert result.stdout.splitlines()[0] == f"{shares[0]:.4f} × {models[0]}"


def test_the_soup_has_the_dtypes_of_its_ingredients(tmp_path):
    for seed in range(2):
        save_crossdit(tmp_path / f"{seed}.safetensors", random_model(seed=seed), torch.float16)
    out = tmp_path / "soup.safetensors"
    assert invoke(tmp_path / "0.safetensors", tmp_path / "1.safetensors", "--out", out).exit_code == 0
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}


def test_models_that_are_not_alike_are_refused_in_one_line(models, tmp_path):
    def other(name, model, dtype=None):
        save_crossdit(tmp_path / name, model, dtype)
        return tmp_path / name

    out = tmp_path / "soup.safetensors"
    deeper = other("deeper.safetensors", random_model(replace(CONFIG, visual_blocks=3)))
    refused(invoke(models[0], deeper, "--out", out), "deeper.safetensors: expected the model of", "also has", "more")
    refused(invoke(deeper, models[0], "--out", out), "0.safetensors: expected the model of", "lacks")
    wider = other("wider.safetensors", random_model(replace(CONFIG, ff_dim=128)))
    refused(invoke(models[0], wider, "--out", out), "as [96, 64], got [128, 64]")
    half = other("half.safetensors", random_model(), torch.float16)
    refused(invoke(models[0], half, "--out", out), "in torch.float32, got torch.float16")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "1,2"), "expected 3, one for each ingredient, got 2"),
        (("--weights", "1,-1,1"), "expected numbers from 0, not all 0"),
        (("--weights", "0,0,0"), "expected numbers from 0, not all 0"),
        (("--weights", "1,nan,1"), "expected numbers from 0, not all 0"),
        (("--weights", "a,b,c"), "--weights: expected numbers with commas"),
        (("--sizes", "1,-4,1"), "--sizes: expected numbers from 0"),
        (("--weights", "1,1,1", "--sizes", "1,1,1"), "give one of"),
        (("--greedy",), "--latents"),
        (("--raw",), "expected the folder of a run with a checkpoint"),
    ],
)
def test_options_that_cannot_be_are_one_line(models, tmp_path, options, words):
    refused(invoke(*models, "--out", tmp_path / "soup.safetensors", *options), words)
    assert not (tmp_path / "soup.safetensors").exists()


def test_one_ingredient_is_no_soup(models, tmp_path):
    refused(invoke(models[0], "--out", tmp_path / "soup.safetensors"), "two ingredients or more, got 1")


def test_greedy_keeps_what_lowers_the_loss_and_is_never_worse_than_the_best(models):
    ingredients = [open_model(path) for path in models]
    states = [load_crossdit(path).state_dict() for path in models]
    name = next(iter(states[0]))
    target = (states[0][name] + states[1][name]) / 2  # the third only takes it away from there

    def loss(state):
        return float((state[name] - target).square().sum())

    weights, least = soup.greedy(ingredients, loss)
    assert weights == [0.5, 0.5, 0.0]
    assert least == pytest.approx(0, abs=1e-9)
    assert soup.greedy(ingredients, lambda state: float((state[name] - states[2][name]).square().sum())) == (
        [0.0, 0.0, 1.0],
        0.0,
    )


def test_greedy_chooses_by_the_loss_on_the_latents_it_is_given(models, tmp_path, monkeypatch):
    def encode(captions):
        tokens = torch.ones(len(captions), 2, CONFIG.in_text_dim)
        return TextCondition(tokens, None, torch.ones(len(captions), CONFIG.in_text_dim2))

    monkeypatch.setattr(soup, "MiniLMTextEncoder", lambda device: SimpleNamespace(encode=encode))
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    with ShardWriter(held_out / "00000.tar") as shard:
        shard.write(sample("a.mp4", (2, 4, 4)))
    out = tmp_path / "soup.safetensors"
    result = invoke(*models, "--out", out, "--greedy", "--latents", held_out)
    assert result.exit_code == 0, result.output
    data = LatentSet(read_shards(held_out), {})
    alone = [probe_loss(load_crossdit(path), data, encode, DENSE) for path in models]
    chosen = probe_loss(load_crossdit(out), data, encode, DENSE)
    assert result.stdout.startswith(f"validation loss {chosen:.5f}\n")
    assert chosen <= min(alone)
    best = alone.index(min(alone))
    assert not result.stdout.splitlines()[1 + best].startswith("0.0000")


def test_of_a_run_the_averaged_weights_are_taken(tmp_path):
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        save_crossdit(tmp_path / str(seed) / "crossdit.safetensors", random_model(seed=seed))
    out = tmp_path / "soup.safetensors"
    assert invoke(tmp_path / "0", tmp_path / "1", "--out", out).exit_code == 0
    averaged = [random_model(seed=seed).state_dict() for seed in range(2)]
    for name, tensor in load_crossdit(out).state_dict().items():
        torch.testing.assert_close(tensor, (averaged[0][name] + averaged[1][name]) / 2, rtol=1e-6, atol=1e-7)


def test_of_a_run_the_raw_weights_are_those_of_its_newest_checkpoint(tmp_path):
    loops = []
    for number in range(2):
        loop = tiny_loop(steps=2, learning_rate=0.01 * (number + 1))
        loop.run(tmp_path / str(number), every=2)
        loops.append(loop.stage.model.state_dict())
    out = tmp_path / "soup.safetensors"
    result = invoke(tmp_path / "0", tmp_path / "1", "--out", out, "--raw")
    assert result.exit_code == 0, result.output
    for name, tensor in load_crossdit(out).state_dict().items():
        torch.testing.assert_close(tensor, (loops[0][name] + loops[1][name]) / 2, rtol=1e-6, atol=1e-7)


@needs_full_disk
def test_a_full_disk_leaves_the_former_soup(models, tmp_path, monkeypatch):
    out = tmp_path / "soup.safetensors"
    assert invoke(*models, "--out", out).exit_code == 0
    before = out.read_bytes()
    fill_disk_under(out.name, monkeypatch)
    refused(invoke(*models, "--out", out, "--weights", "1,2,3"), "No space left on device")
    assert out.read_bytes() == before
