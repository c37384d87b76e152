"""Confidence intervals by resampling: what a number would have been with other prompts of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 5_000


def bootstrap_interval(
    count: int, statistic: Callable[[np.ndarray], float | None], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % percentile interval (Efron 1979) of a statistic of ``count`` units that were drawn independently.

    A prompt is one unit, with all of its completions: those of one prompt are alike. Of few units (under thirty or so)
    the interval is too narrow.

    Args:
        statistic: receives the indices of a resample, (count,), and returns its number, or ``None`` where that resample
            has none.
        seed: of the resampling; the same one gives the same interval.

    Returns:
        The interval; ``None`` without units, or where no resample has a number.
    """
    if count == 0:
        return None
    generator = np.random.default_rng(seed)
    found = [statistic(generator.integers(count, size=count)) for _ in range(resamples)]
    values = [value for value in found if value is not None and not math.isnan(value)]
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent values; ``None`` for fewer than two."""
    return None if len(values) < 2 else float(np.std(values, ddof=1) / math.sqrt(len(values)))
