"""Confidence intervals of proportions (Wilson), and the win rate with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def win_rate(wins: Sequence[float]) -> tuple[float, float, float]:
    """The win rate of one comparison or more, and the bounds of its `wilson_interval`. A tie counts 0.5.

    >>> tuple(round(value, 4) for value in win_rate([1.0, 0.5, 0.0, 1.0]))
    (0.625, 0.2194, 0.9081)
    """
    share = float(np.mean(wins))
    return share, *wilson_interval(share, len(wins))


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion ``share`` observed in ``count`` trials (Wilson 1927).

    It assumes outcomes of 0 or 1. Ties (0.5) have less variance, so with ties the interval is rather too wide.

    >>> tuple(round(bound, 4) for bound in wilson_interval(0.8, 100))
    (0.7112, 0.8666)
    """
    assert count > 0
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    centre = share + z * z / (2 * count)
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
