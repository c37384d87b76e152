"""Correlations from parts of the data."""

import numpy as np
import pytest

from online_dpo.stats.moments import Moments


def test_a_correlation_by_hand():
    # distances from the means: x -1, 0, 1; y -1, 1, 0: products 1 + 0 + 0, squares 2 and 2
    assert Moments.of([1, 2, 3], [4, 6, 5]).correlation() == pytest.approx(0.5)
    assert Moments.of([1, 2, 3], [6, 4, 2]).correlation() == pytest.approx(-1.0)


def test_parts_give_the_correlation_of_the_whole():
    draw = np.random.default_rng(0)
    x = draw.normal(1e6, 1.0, 1000)  # far from 0: sums of squares would lose the spread
    y = 0.3 * x + draw.normal(0, 1, 1000)
    parts = [Moments.of(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 400), (400, 400), (400, 1000))]
    whole = sum(parts, Moments())
    assert whole.count == 1000
    assert whole.correlation() == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert Moments(*whole.numbers()) == whole


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([0.1] * 7, range(7)), ([1e9 + 0.1] * 3, [1, 2, 3])])
def test_there_is_none_where_a_number_is_constant(x, y):
    assert Moments.of(x, y).correlation() is None


def test_pairs_with_a_number_that_is_not_finite_are_left_out():
    assert Moments.of([1, 2, float("nan"), 9], [2, 4, 1, float("inf")]) == Moments.of([1, 2], [2, 4])
