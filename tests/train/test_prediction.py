"""What the planner says of a run: the formulas, on the sizes and the precision of this trainer."""

from dataclasses import asdict, replace

import pytest

from k5kernels.planner import H100, memory_terms, step_time_ms, step_time_terms
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.presets import CrossDiTConfig
from model.crossdit import CrossDiT
from model.presets import PRESETS
from train.crossdit_stage import FlowMatching
from train.prediction import LOADED_BYTES, Run, nearest_layout, predicted_memory, predicted_ms, tokens

NANO = PRESETS["nano"]
GRID, LONGER = (4, 32, 48), (8, 32, 48)


def a_run(
    model: CrossDiTConfig = NANO, grids=None, checkpointing: bool = True, density: float = 1.0, layout=None, **training
) -> Run:
    return Run(model, FlowMatching(**training), grids or {GRID: 1}, checkpointing, density, layout)


def test_the_time_is_the_formulas():
    pixels = 4 * 256 * 384
    assert predicted_ms(a_run(batch=3), H100) == pytest.approx(step_time_ms(192, pixels, 8, 3))


def test_the_time_of_several_grids_is_their_mean_by_samples():
    one, other = (predicted_ms(a_run(grids={grid: 1}), H100) for grid in (GRID, LONGER))
    assert predicted_ms(a_run(grids={GRID: 3, LONGER: 1}), H100) == pytest.approx((3 * one + other) / 4)


def test_nabla_saves_attention_alone():
    saved = predicted_ms(a_run(), H100) - predicted_ms(a_run(density=0.25), H100)
    assert saved == pytest.approx(0.75 * step_time_terms(192, 4 * 256 * 384, 8, 1).attention_ms)


def test_latent_frames_cut_the_sample():
    assert tokens(a_run(latent_frames=2), GRID) == 2 * 16 * 24
    assert tokens(a_run(latent_frames=9), GRID) == 4 * 16 * 24


def test_activations_are_the_formulas_in_float32():
    terms = memory_terms(192, 48, 448, 8, 2 * 8 * 16 * 24, gpus=1, offload=False)
    memory = predicted_memory(a_run(grids={GRID: 9, LONGER: 1}, batch=2))
    assert memory.block_inputs_bytes == 2 * terms.block_inputs_bytes
    assert memory.block_activations_bytes == 2 * terms.block_activations_bytes


def test_states_and_gradients_are_of_all_the_models_weights():
    weights = sum(parameter.numel() for parameter in CrossDiT(NANO).parameters())
    memory = predicted_memory(a_run())
    assert memory.states_bytes + memory.ema_bytes == 16 * weights
    assert memory.gradients_bytes == 4 * weights


def test_of_gradients_and_block_inputs_the_larger_counts():
    for frames in (1, 400):
        memory = predicted_memory(a_run(grids={(frames, 32, 48): 1}))
        held = max(memory.gradients_bytes, memory.block_inputs_bytes)
        of_a_block = memory.block_activations_bytes + memory.backward_bytes
        rest = memory.states_bytes + memory.ema_bytes + memory.reserve_bytes
        assert memory.total_bytes == pytest.approx(held + of_a_block + rest, rel=1e-15)


def test_bf16_halves_activations_and_no_states():
    wide, narrow = asdict(predicted_memory(a_run())), asdict(predicted_memory(a_run(bf16=True)))
    halved = {name for name in wide if 0 < narrow[name] == wide[name] / 2}
    assert halved >= {"block_inputs_bytes", "block_activations_bytes", "backward_bytes"}
    states = {"states_bytes", "gradients_bytes", "ema_bytes"}
    assert all(narrow[name] == wide[name] > 0 for name in states)


def test_the_allocator_keeps_shares_of_what_comes_and_goes():
    memory = predicted_memory(a_run())
    of_a_block = memory.block_activations_bytes + memory.backward_bytes
    assert memory.reserve_bytes == LOADED_BYTES + 1.5 * of_a_block + 2 * memory.gradients_bytes


def test_without_checkpointing_every_block_keeps_what_one_keeps():
    kept = predicted_memory(a_run(checkpointing=False))
    assert kept.block_inputs_bytes == 0
    assert kept.block_activations_bytes == 8 * predicted_memory(a_run()).block_activations_bytes


def test_the_nearest_layout_of_a_run_too_large_for_one_gpu_has_several():
    words = nearest_layout(a_run(replace(NANO, model_dim=4096, ff_dim=16384, visual_blocks=60)), H100)
    assert words.startswith("the nearest layout that fits, in bfloat16: ")
    assert int(words.partition(": ")[2].split()[0]) > 1


def test_a_run_that_no_number_of_gpus_holds_says_so():
    assert "no layout is possible on 1024 GPUs" in nearest_layout(a_run(), replace(H100, memory_bytes=1000))


def test_processes_share_samples_tokens_and_weights():
    layout = ClusterLayout(shards=4, replicas=2, sequence_parallel=2, micro_batch=2)
    one, many = a_run(batch=8), a_run(batch=8, layout=layout)
    assert predicted_ms(many, H100) == pytest.approx(predicted_ms(one, H100) / 8)
    of_one, of_many = predicted_memory(one), predicted_memory(many)
    assert of_many.block_inputs_bytes == of_one.block_inputs_bytes / 8
    assert of_many.states_bytes + of_many.ema_bytes == (of_one.states_bytes + of_one.ema_bytes) / 4
