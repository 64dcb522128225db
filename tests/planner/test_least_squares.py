"""Coefficients of terms."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from k5kernels.planner.least_squares import relative_fit

UNITS = np.array([1.0, 1e6, 1e-6])
TERMS = np.random.default_rng(0).uniform(0.1, 10, (12, 3)) * UNITS


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_figures_that_are_sums_of_terms_give_their_coefficients_back(coefficients):
    known = coefficients / UNITS
    np.testing.assert_allclose(relative_fit(TERMS, TERMS @ known), known, rtol=1e-6)


def test_a_coefficient_that_would_be_negative_is_zero_and_the_others_are_the_best_without_it():
    measured = TERMS[:, 0] - 0.05 * TERMS[:, 0].min() / TERMS[:, 1].max() * TERMS[:, 1]
    found = relative_fit(TERMS, measured)
    assert found[1] == 0
    others = relative_fit(TERMS * [1, 0, 1], measured)
    np.testing.assert_array_equal(found, others)


def test_a_term_that_does_not_show_gets_zero():
    assert relative_fit(TERMS * [1, 0, 1], TERMS @ [1, 0, 1])[1] == 0


def test_small_figures_count_as_much_as_large_ones():
    measured = np.array([1.0, 1000.0])
    (found,) = relative_fit(np.array([[1.0], [2000.0]]), measured)
    np.testing.assert_allclose(found, 0.6)  # least (x − 1)² + (2x − 1)²; by absolute errors it would be a half
