"""`Moments` of pairs of numbers: what a correlation needs, in a form that parts of the data can be merged from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

CONSTANT = 1e-12
"""Numbers that spread less than this share of their size count as equal: the rest is rounding."""


@dataclass(frozen=True)
class Moments:
    """Count and means of pairs of numbers, and the sums of squares and products of their distances from the means.

    >>> round((Moments.of([1, 2], [2, 4]) + Moments.of([3], [6])).correlation(), 6)
    1.0
    """

    count: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, xs: Sequence[float], ys: Sequence[float]) -> Moments:
        """Return the moments of some pairs. Those with a number that is not finite are left out."""
        x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        if not len(x):
            return cls()
        dx, dy = x - x.mean(), y - y.mean()
        sums = (float(dx @ dx), float(dy @ dy), float(dx @ dy))
        return cls(float(len(x)), float(x.mean()), float(y.mean()), *sums)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share, weight = other.count / count, self.count * other.count / count
        return Moments(
            count,
            self.mean_x + dx * share,
            self.mean_y + dy * share,
            self.xx + other.xx + dx * dx * weight,
            self.yy + other.yy + dy * dy * weight,
            self.xy + other.xy + dx * dy * weight,
        )

    def correlation(self) -> float | None:
        """Return Pearson's correlation; ``None`` if either number is the same everywhere, or there are fewer than 2."""
        spread_x, spread_y = (math.sqrt(s / self.count) if self.count else 0.0 for s in (self.xx, self.yy))
        if spread_x <= CONSTANT * abs(self.mean_x) or spread_y <= CONSTANT * abs(self.mean_y):
            return None
        return max(-1.0, min(1.0, self.xy / math.sqrt(self.xx) / math.sqrt(self.yy)))

    def numbers(self) -> tuple[float, ...]:
        """Return the six numbers, to save or to send."""
        return astuple(self)
