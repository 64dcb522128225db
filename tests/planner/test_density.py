"""The expected density of a NABLA mask."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner.density import LOGIT_DEVIATION, MEASURED, nabla_density


def test_full_attention_reads_every_block():
    assert nabla_density(None) == nabla_density(1) == 1


@given(st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_more_mass_keeps_more_blocks_and_never_more_than_its_share(thr, more):
    assert 0 < nabla_density(thr) < nabla_density(thr + more)
    assert nabla_density(thr) < thr


@pytest.mark.parametrize("thr", MEASURED)
def test_what_the_paper_measured_is_met_within_a_fifth(thr):
    assert nabla_density(thr) == pytest.approx(MEASURED[thr], rel=0.2)


@pytest.mark.parametrize("thr", [0.4, 0.7, 0.9])
def test_normal_logits_have_that_density(thr):
    logits = LOGIT_DEVIATION * torch.randn(64, 8192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities = logits.softmax(-1).sort(-1, descending=True).values
    kept = (probabilities.cumsum(-1) < thr).sum(-1) + 1
    assert kept.double().mean() / 8192 == pytest.approx(nabla_density(thr), rel=0.02)


@pytest.mark.parametrize("thr", [0, -0.5, 1.5, math.nan, "0.9"])
def test_a_threshold_that_cannot_be_is_refused(thr):
    with pytest.raises(ValueError, match="nabla_thr: expected a number above 0, up to 1"):
        nabla_density(thr)
