"""The learning rate warms up, stays, and falls to zero."""

import pytest

from train.schedule import Schedule


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.steps)]


def test_warms_up_linearly_and_stays_at_the_peak():
    shares = factors(Schedule(100, warmup_steps=4))
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(shares[4:]) == {1.0}


def test_falls_linearly_over_the_last_steps():
    shares = factors(Schedule(100, warmup_steps=0, decay_steps=10))
    assert set(shares[:90]) == {1.0}
    assert shares[95] == pytest.approx(0.5)
    assert 0 < shares[-1] <= 0.1


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("warmup_steps", -1), ("decay_steps", -1)])
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        Schedule(**{"steps": 1} | {field: value})
