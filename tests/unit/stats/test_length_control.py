"""What a judge's preferences would be at equal lengths."""

from __future__ import annotations

import numpy as np
import pytest

from online_dpo.stats.length_control import length_controlled_win_rate


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_judge_that_only_likes_length_is_even_at_equal_lengths():
    """Nine answers in ten are longer, and the longer one always wins, so lengths separate wins from losses."""
    differences = np.array([d for d in range(-20, 181) if d != 0], dtype=float)
    wins = (differences > 0).astype(float)
    assert wins.mean() == 0.9
    assert length_controlled_win_rate(wins, differences) == pytest.approx(0.5, abs=0.06)


def test_a_judge_that_ignores_length_is_left_as_it_is():
    """Each length is met once by a win for every loss times four."""
    differences = np.repeat(np.arange(-30, 70, dtype=float), 5)
    wins = np.tile([1, 1, 1, 1, 0.0], 100)
    assert length_controlled_win_rate(wins, differences) == pytest.approx(0.8, abs=1e-3)


def test_the_coefficients_that_made_the_preferences_are_found():
    """Soft preferences that are exactly those of the model: quality 0.7 logits, length 1.5."""
    differences = np.random.default_rng(0).normal(40, 60, size=4000)
    preferences = sigmoid(0.7 + 1.5 * np.tanh(differences / differences.std()))
    assert preferences.mean() > sigmoid(0.7) + 0.08
    assert length_controlled_win_rate(preferences, differences) == pytest.approx(sigmoid(0.7), abs=2e-3)


@pytest.mark.parametrize(("win", "bound"), [(1.0, (0.99, 1.0)), (0.0, (0.0, 0.01))])
def test_all_won_or_lost_stays_finite(win, bound):
    rate = length_controlled_win_rate(np.full(50, win), np.arange(50.0) - 10)
    assert rate is not None and bound[0] <= rate <= bound[1]


def test_lengths_that_tell_nothing():
    preferences = np.array([1, 1, 0, 1.0])
    assert length_controlled_win_rate(preferences, np.zeros(4)) == pytest.approx(0.75, abs=1e-3)
    assert length_controlled_win_rate(preferences, np.full(4, 7.0)) is None  # always longer by as much: confounded
    assert length_controlled_win_rate(np.empty(0), np.empty(0)) is None


def test_the_unit_of_length_does_not_matter():
    differences = np.random.default_rng(1).normal(3, 10, size=200)
    wins = (np.random.default_rng(2).random(200) < sigmoid(0.1 * differences)).astype(float)
    one, other = (length_controlled_win_rate(wins, scale * differences) for scale in (1, 250))
    assert one == pytest.approx(other, rel=1e-9)
