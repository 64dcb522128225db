"""The learning rate warms up, stays, and falls to zero."""

import pytest

from train.schedule import learning_rate


def test_warms_up_linearly_and_stays_at_the_peak():
    rates = [learning_rate(step, 100, 2.0, warmup_steps=4, decay_steps=0) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates[4:]) == {2.0}


def test_falls_linearly_over_the_last_steps():
    rates = [learning_rate(step, 100, 1.0, warmup_steps=0, decay_steps=10) for step in range(100)]
    assert set(rates[:90]) == {1.0}
    assert rates[95] == pytest.approx(0.5)
    assert 0 < rates[-1] <= 0.1
