"""Bootstrap confidence intervals: how far a statistic would vary with other prompts of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 5_000


def bootstrap_interval(
    count: int, statistic: Callable[[np.ndarray], float | None], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval (Efron 1979) of a statistic of ``count`` independent units.

    A unit is one prompt with all of its completions, because completions of the same prompt are correlated. With few
    units (fewer than about thirty) the interval is too narrow.

    Args:
        statistic: returns the statistic of a resample, given as indices of units, (count,); ``None`` if it is
            undefined for that resample.
        seed: the seed of the resampling; the same seed gives the same interval.

    Returns:
        The interval; ``None`` without units, or if the statistic is undefined for all resamples.
    """
    if count == 0:
        return None
    generator = np.random.default_rng(seed)
    statistics = [statistic(generator.integers(count, size=count)) for _ in range(resamples)]
    values = [value for value in statistics if value is not None and not math.isnan(value)]
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean of independent values; ``None`` for fewer than two."""
    return None if len(values) < 2 else float(np.std(values, ddof=1) / math.sqrt(len(values)))
