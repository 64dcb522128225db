"""How much of a pass the GPU is busy: spans may overlap, lie in each other, and come in any order."""

import pytest

from bench.gpu.graph import covered_share


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(0, 10)], 1.0),
        ([(0, 4), (6, 10)], 0.8),
        ([(6, 10), (0, 4)], 0.8),
        ([(0, 6), (4, 10)], 1.0),
        ([(5, 15), (6, 8), (20, 25)], 0.75),
    ],
)
def test_share_of_the_time_in_which_a_kernel_ran(spans, share):
    assert covered_share(spans) == share
