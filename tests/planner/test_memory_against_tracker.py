"""The memory formula against PyTorch's tracker, on CrossDiT split over a fake group of 64."""

import pytest
import torch

from bench.planner_memory import GPUS, Tracked, errors, predicted, track
from k5kernels.planner import MODELS, memory_terms
from model.crossdit import CrossDiT
from model.presets import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of in-place changes: there are none

FLOOR = 0.10
PRESET_NAMES = ["video_lite", "video_pro"]
CLIP_5S = (31, 32, 48)  # tokens of 5 s at 512 × 768
BLOCKS = 2  # of the quick tests


@pytest.fixture(scope="module", params=["video_lite", pytest.param("video_pro", marks=pytest.mark.slow)])
def two_blocks(request) -> tuple[str, dict[bool, Tracked]]:
    """(preset, what the tracker says of two of its blocks with offload and without)."""
    return request.param, {offload: track(request.param, CLIP_5S, offload, BLOCKS) for offload in (False, True)}


def test_activations_of_checkpointed_blocks_are_the_formulas(two_blocks):
    name, tracked = two_blocks
    formula = predicted(name, CLIP_5S, False, BLOCKS)
    assert abs(errors(tracked[False], formula)["activations"]) < FLOOR


def test_with_offload_the_formula_lacks_the_three_block_inputs_that_are_in_memory(two_blocks):
    name, tracked = two_blocks
    formula = predicted(name, CLIP_5S, True, BLOCKS)
    one_input = 2 * CLIP_5S[0] * CLIP_5S[1] * CLIP_5S[2] * MODELS[name].model_dim
    assert errors(tracked[True], formula)["activations"] < -0.05
    assert (formula.activations_bytes + 3 * one_input) / tracked[True].activations == pytest.approx(1, abs=0.05)


def test_offload_moves_the_input_of_every_block_to_the_host_and_nothing_else(two_blocks):
    name, tracked = two_blocks
    assert tracked[False].host == 0
    assert tracked[True].host == predicted(name, CLIP_5S, False, BLOCKS).block_inputs_bytes


def test_offload_never_costs_memory_of_the_device(two_blocks):
    _, tracked = two_blocks
    assert tracked[True].total <= tracked[False].total


def test_states_are_twelve_and_gradients_four_bytes_a_parameter(two_blocks):
    name, tracked = two_blocks
    with torch.device("meta"):
        parts = CrossDiT(PRESETS[name])
    del parts.visual_transformer_blocks[BLOCKS:]
    share = sum(parameter.numel() for parameter in parts.parameters()) / GPUS
    for offload in (False, True):
        # Every weight is padded to a multiple of the ranks along its first side, which biases show most.
        assert tracked[offload].states == pytest.approx(12 * share, rel=0.01)
        assert tracked[offload].gradients == pytest.approx(4 * share, rel=0.01)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_the_formulas_parameters_are_those_of_the_model_but_for_text_and_embeddings(name):
    shape = MODELS[name]
    with torch.device("meta"):
        whole = sum(parameter.numel() for parameter in CrossDiT(PRESETS[name]).parameters())
    sizes = (shape.model_dim, shape.time_dim, shape.ff_dim, shape.blocks)
    assert -0.06 < memory_terms(*sizes, tokens=1, gpus=1, offload=False).states_bytes / (12 * whole) - 1 < -0.04


@pytest.mark.slow  # a minute or two each; the benchmark has the fourth
@pytest.mark.parametrize(("name", "offload"), [("video_lite", False), ("video_lite", True), ("video_pro", True)])
def test_every_term_of_a_whole_model_is_within_a_tenth_of_the_trackers(name, offload):
    found = errors(track(name, CLIP_5S, offload), predicted(name, CLIP_5S, offload))
    assert set(found) == {"states", "gradients", "activations"}
    assert all(abs(error) <= FLOOR for error in found.values()), found
