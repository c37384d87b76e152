"""Preference probabilities: the probability that one of two answers is the better one."""

from __future__ import annotations

import math


def sigmoid(x: float) -> float:
    """The logistic function: the probability with log-odds ``x``, computed without overflow.

    >>> sigmoid(0.0), sigmoid(-1000.0)
    (0.5, 0.0)
    """
    return (1 + math.tanh(x / 2)) / 2


def preference_by_score(score: float, other_score: float) -> float:
    """The preference that two scores imply: 1 if ``score`` is higher, 0.5 if both are equal, else 0.

    >>> preference_by_score(2.0, 1.0), preference_by_score(1.0, 1.0)
    (1.0, 0.5)
    """
    return 1.0 if score > other_score else 0.5 if score == other_score else 0.0
