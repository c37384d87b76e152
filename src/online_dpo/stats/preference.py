"""The chance that one of two answers is the better one."""

from __future__ import annotations

import math


def sigmoid(x: float) -> float:
    """The chance that has these log-odds, without overflow.

    >>> sigmoid(0.0), sigmoid(-1000.0)
    (0.5, 0.0)
    """
    return (1 + math.tanh(x / 2)) / 2


def preference_by_score(mine: float, theirs: float) -> float:
    """1 for the higher score, one half for equal ones.

    >>> preference_by_score(2.0, 1.0), preference_by_score(1.0, 1.0)
    (1.0, 0.5)
    """
    return 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0
