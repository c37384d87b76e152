"""Confidence intervals: Wilson's against published values, the bootstrap's against the normal distribution."""

import numpy as np
import pytest

from online_dpo.stats.bootstrap import bootstrap_interval, standard_error
from online_dpo.stats.intervals import wilson_interval


def test_wilson_interval_against_published_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 29 of 29."""
    for wins, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(wins / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1.0, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_a_bootstrap_of_the_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    low, high = bootstrap_interval(400, lambda i: float(values[i].mean()), seed=1)
    error = standard_error(values)
    assert error == pytest.approx(values.std(ddof=1) / 20)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert (low, high) == bootstrap_interval(400, lambda i: float(values[i].mean()), seed=1)
    assert bootstrap_interval(0, lambda i: 1.0, seed=0) is None and standard_error(values[:1]) is None


def test_a_bootstrap_covers_what_it_should():
    """95 of 100 intervals of means of 40 skewed values hold the true mean; at least 85 must, at most 100 can."""
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(100):
        values = generator.exponential(1.0, size=40)
        low, high = bootstrap_interval(40, lambda i, values=values: float(values[i].mean()), seed, resamples=500)
        held += low <= 1.0 <= high
    assert 85 <= held <= 99
