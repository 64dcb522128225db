"""Sizes that every test of GroupNorm draws from."""

from hypothesis import example, given
from hypothesis import strategies as st

ODD_SIZES = (
    {"B": 1, "groups": 1, "in_group": 1, "size": [1, 1]},
    {"B": 2, "groups": 2, "in_group": 8, "size": [3, 7, 5]},
    {"B": 1, "groups": 32, "in_group": 4, "size": [1, 5, 3]},
    {"B": 1, "groups": 2, "in_group": 3, "size": [2, 13, 17]},
    {"B": 2, "groups": 2, "in_group": 3, "size": [3, 43]},  # the last chunk of channels-last has one position
)


def any_sizes(test):
    """Run a test for drawn B, groups, in_group (channels of a group) and size (positions), the odd ones always."""
    for sizes in ODD_SIZES:
        test = example(**sizes)(test)
    return given(
        B=st.integers(1, 2),
        groups=st.integers(1, 5),
        in_group=st.integers(1, 9),
        size=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    )(test)
