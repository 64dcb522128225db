"""Memory of training an adapter: public reports, and how it follows from what is asked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.public_reports import PUBLIC_REPORTS
from k5kernels.planner import MODELS, ClipShape
from k5kernels.planner.lora import ADAPTER_BYTES, LAYERS, Adapter, lora_memory
from k5kernels.planner.quantization import WEIGHT_BYTES

FLOOR = 0.15
LITE, PRO = MODELS["video_lite"], MODELS["video_pro"]
CLIP = ClipShape(512, 768, 121)

adapters = st.builds(
    Adapter,
    st.integers(1, 256),
    st.sampled_from(LAYERS),
    st.sampled_from(list(ADAPTER_BYTES)),
    st.sampled_from(list(WEIGHT_BYTES)),
    st.integers(0, 30),
    st.sampled_from(["float32", "bfloat16", "int8"]),
)


@pytest.mark.parametrize("report", PUBLIC_REPORTS, ids=lambda report: report.what)
def test_what_is_publicly_reported_is_predicted_within_the_floor(report):
    assert abs(report.error) <= FLOOR


@given(adapters, st.integers(1, 100_000), st.booleans())
def test_more_of_anything_takes_no_less_memory(adapter, tokens, checkpointing):
    def total(changed: Adapter = adapter, tokens: int = tokens) -> float:
        return lora_memory(LITE, changed, tokens, checkpointing).total_bytes

    assert total(tokens=tokens + 1) > total()
    assert total(replace(adapter, rank=adapter.rank + 1)) > total()
    assert total(replace(adapter, layers="all")) >= total()
    assert total(replace(adapter, dtype="float32")) >= total()
    assert lora_memory(PRO, adapter, tokens, checkpointing).total_bytes > total()


@given(adapters.filter(lambda adapter: adapter.swapped), st.integers(1, 100_000))
def test_a_swapped_block_saves_its_weights_and_nothing_else(adapter, tokens):
    fewer = replace(adapter, swapped=adapter.swapped - 1)
    saved = lora_memory(LITE, fewer, tokens).total_bytes - lora_memory(LITE, adapter, tokens).total_bytes
    assert saved == pytest.approx(WEIGHT_BYTES[adapter.base_dtype] * LITE.parameters / LITE.blocks, rel=1e-4)


def test_a_smaller_base_saves_but_pays_for_the_copy_of_the_block_that_runs():
    adapter = Adapter(16)
    full, half, quarter = (
        lora_memory(LITE, replace(adapter, base_dtype=dtype), CLIP.tokens).frozen_weights_bytes
        for dtype in ("bfloat16", "int8", "nf4")
    )
    assert full == 2 * LITE.parameters
    assert half == LITE.parameters + 2 * LITE.parameters / LITE.blocks
    assert quarter < half


def test_the_adapter_has_two_thin_weights_for_each_layer_it_learns():
    d, d_f = LITE.model_dim, LITE.ff_dim
    qkv = 6 * (d + d)
    assert Adapter(8).parameters(LITE) == 8 * 32 * qkv
    assert Adapter(8, "all").parameters(LITE) == 8 * 32 * (qkv + 2 * (d + d) + (d + d_f) + (d_f + d))
    memory = lora_memory(LITE, Adapter(8, dtype="float32"), CLIP.tokens)
    assert memory.states_bytes == 12 * 8 * 32 * qkv
    assert memory.gradients_bytes == 4 * 8 * 32 * qkv


def test_without_checkpointing_every_block_keeps_what_one_keeps():
    kept, dropped = (lora_memory(LITE, Adapter(16), CLIP.tokens, checkpointing) for checkpointing in (True, False))
    assert dropped.block_inputs_bytes == 0
    assert dropped.block_activations_bytes == 32 * kept.block_activations_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank: expected an integer from 1 .* got 0"),
        ({"layers": "mlp"}, "layers: expected one of qkv, all, got 'mlp'"),
        ({"dtype": "nf4"}, "dtype: expected one of bfloat16, float32, got 'nf4'"),
        ({"base_dtype": "fp8"}, "base_dtype: expected one of bfloat16, int8, float8, nf4, got 'fp8'"),
        ({"optimizer_dtype": 8}, "optimizer_dtype: expected one of float32, bfloat16, int8, got 8"),
        ({"swapped": 31}, "swapped: expected an integer from 0 to 30 of 32 blocks, got 31"),
        ({"swapped": -1}, "swapped: expected an integer from 0 to 30 of 32 blocks, got -1"),
        ({"swapped": 1.5}, r"swapped: expected an integer from 0 to 30 of 32 blocks, got 1\.5"),
    ],
)
def test_a_field_that_cannot_be_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        lora_memory(LITE, Adapter(**({"rank": 16} | change)), CLIP.tokens)


@pytest.mark.parametrize("tokens", [0, -1, float("nan"), float("inf"), "many", 10**30])
def test_tokens_that_cannot_be_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens: expected a number above 0"):
        lora_memory(LITE, Adapter(16), tokens)
