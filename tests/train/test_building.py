"""A model is made in its shards, and is the one that a single process makes; so is one that is read into them."""

from pathlib import Path

import pytest
import torch
from sharded_checks import built
from small_crossdit import CONFIG, random_model
from tiny_stage import TINY, tiny_loop

from bench.gloo_processes import on_processes
from model.crossdit import CrossDiT, Modulation
from model.weights import save_crossdit
from train.building import build_model, random_weights
from train.parallel import ALONE
from train.stored_model import open_model


def assert_equal(state, expected) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_random_weights_are_those_of_a_fresh_model_and_so_are_the_draws_behind_them():
    torch.manual_seed(5)
    fresh = CrossDiT(TINY).state_dict()
    following = torch.rand(3)
    made = build_model(TINY, None, 5, ALONE)
    assert torch.equal(torch.rand(3), following)
    assert_equal(made.state_dict(), fresh)
    assert made.training
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_all_layers_are_drawn_in_the_same_memory_which_is_that_of_the_largest():
    storages = [weight.untyped_storage() for _, weight in random_weights(TINY, 0)]
    assert len({storage.data_ptr() for storage in storages}) == 1
    layers = CrossDiT(TINY).modules()
    assert storages[0].nbytes() == 4 * max(sum(w.numel() for w in one.parameters(recurse=False)) for one in layers)


def test_a_modulation_that_is_zero_at_first_draws_all_the_same_and_seeds_keep_their_models():
    torch.manual_seed(0)
    torch.nn.Linear(4, 6)
    following = torch.rand(3)
    torch.manual_seed(0)
    layer = Modulation(4, 2, 3).out_layer
    assert torch.equal(torch.rand(3), following)
    assert not layer.weight.any()
    assert not layer.bias.any()


def test_a_model_starts_from_weights_in_any_dtype_as_float32(tmp_path):
    save_crossdit(tmp_path / "weights", random_model(), torch.float16)
    made = build_model(CONFIG, open_model(tmp_path / "weights"), 0, ALONE).state_dict()
    assert_equal(made, {name: tensor.half().float() for name, tensor in random_model().state_dict().items()})


@pytest.fixture
def sources(tmp_path) -> list[Path | None]:
    """Random weights, a file of weights, a run that has not ended."""
    save_crossdit(tmp_path / "weights", random_model(TINY))
    tiny_loop(2).run(tmp_path / "run", every=2)
    return [None, tmp_path / "weights", tmp_path / "run"]


def assert_starts_are_equal(meshes, sources) -> None:
    world = meshes[0][0] * meshes[0][1] * meshes[0][2]
    rows = on_processes(world, built, meshes, list(map(str, filter(None, sources))))
    assert len(rows) == len(meshes) * len(sources)
    for mesh, source, equal in rows:
        assert equal, (mesh, source)


def test_two_processes_start_with_the_weights_of_one(sources):
    assert_starts_are_equal([(1, 2, 1)], sources)


@pytest.mark.slow
def test_four_processes_start_with_the_weights_of_one(sources):
    assert_starts_are_equal([(1, 4, 1), (2, 2, 1)], sources)
