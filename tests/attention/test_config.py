"""How a model is told which attention to run."""

import pytest

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.presets import RELEASED

NABLA = AttentionConfig("nabla", 0.5, (3, 1, 1))


def test_attention_is_dense_by_the_best_engine_unless_told_otherwise():
    assert AttentionConfig("auto") == DENSE
    assert not DENSE.sparse
    assert NABLA.sparse


@pytest.mark.parametrize("thr", [0, 0.5, 1])
def test_every_share_of_the_probability_mass_can_be_kept(thr):
    assert AttentionConfig("nabla", thr).thr == thr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("flash",), "engine: expected one of auto, .*, got 'flash'"),
        (("nabla", -0.1), "thr: expected the probability mass to keep, 0 to 1, got -0.1"),
        (("nabla", 1.1), "thr: expected"),
        (("nabla", float("nan")), "thr: expected"),
        (("nabla", 0.9, (3, 0, 3)), "sta: expected three positive integers"),
        (("nabla", 0.9, (3, 3)), "sta: expected three positive integers"),
    ],
)
def test_an_impossible_attention_is_refused_by_the_name_of_the_argument(values, words):
    with pytest.raises(ValueError, match=words):
        AttentionConfig(*values)


@pytest.mark.parametrize(
    ("preset", "clip", "engine"),
    [
        ("lite_t2v_10s_sft_sd", (512, 768, 10), "nabla"),
        ("lite_t2v_10s_sft_sd", (512, 768, 5), "sdpa"),
        ("lite_t2v_5s_sft_sd", (512, 768, 5), "sdpa"),
        ("pro_t2v_5s_sft_hd", (768, 1280, 5), "nabla"),
        ("lite_t2i_sft_hd", (1024, 1024, 0), "sdpa"),
    ],
)
def test_a_released_model_takes_the_engine_of_the_clip_and_keeps_its_thr_and_window(preset, clip, engine):
    released = RELEASED[preset].attention
    chosen = released.for_clip(*clip, device="cpu")
    assert chosen == AttentionConfig(engine, released.thr, released.sta)
