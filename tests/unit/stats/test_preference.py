"""Chances from scores, at their ends as well."""

import math

import pytest

from online_dpo.stats.preference import preference_by_score, sigmoid


def test_sigmoid_against_its_definition_and_where_that_overflows():
    for x in (-30.0, -2.5, 0.0, 0.1, 4.0):
        assert sigmoid(x) == pytest.approx(1 / (1 + math.exp(-x)), abs=1e-15)
    assert (sigmoid(-1e6), sigmoid(1e6), sigmoid(-math.inf)) == (0.0, 1.0, 0.0)


@pytest.mark.smoke
def test_the_higher_score_is_preferred_and_equal_ones_are_even():
    assert [preference_by_score(*scores) for scores in ((-1.0, -2.0), (3.0, 3.0), (0.0, 1e-9))] == [1.0, 0.5, 0.0]
