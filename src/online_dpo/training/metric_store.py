"""Metrics that mean the same on one rank and on many: sums and counts, gathered once a log."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from online_dpo.distributed.collectives import from_every_rank
from online_dpo.stats.moments import Moments

Value = torch.Tensor | Iterable[float] | float
Collected = tuple[dict[str, tuple[float, float]], dict[str, float], dict[str, float], dict[str, tuple[float, ...]]]
"""What one rank collected, by name: sums with their counts, totals, largest values, moments."""


@dataclass(frozen=True)
class Snapshot:
    """What a `MetricStore` had collected at one moment; its values are never changed in place."""

    sums: dict[str, Any]
    counts: dict[str, Any]
    totals: dict[str, float]
    largest: dict[str, torch.Tensor]
    moments: Mapping[str, Moments] = field(default_factory=dict)


class MetricStore:
    """Collects values between two logs; ``drain`` reduces them over all ranks and starts anew.

    ``mean`` averages over all values that any rank added; ``total`` sums; ``correlation`` is over all pairs of numbers.
    Tensors stay on their device until ``drain``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, Any] = defaultdict(float)
        self._totals: dict[str, float] = defaultdict(float)
        self._largest: dict[str, torch.Tensor] = {}
        self._moments: dict[str, Moments] = defaultdict(Moments)

    def mean(self, name: str, values: Value, where: torch.Tensor | None = None) -> None:
        """Adds values to a mean. Those that are not finite (of a step that the guard will skip) are left out, so that
        they do not hide the others. ``where`` (bool) chooses among them without waiting for a device.
        """
        if not isinstance(values, torch.Tensor):
            values = torch.tensor([values] if isinstance(values, (int, float)) else list(values), dtype=torch.float64)
        finite = values.detach().isfinite()
        if where is not None:
            finite &= where
        self._sums[name] = self._sums[name] + torch.where(finite, values.detach().double(), 0.0).sum()
        self._counts[name] = self._counts[name] + finite.sum()

    def total(self, name: str, amount: float) -> None:
        """Adds to a sum over all ranks."""
        self._totals[name] += amount

    def ratio(self, name: str, part: float, whole: float) -> None:
        """Adds to a mean whose denominator is ``whole``: the share of ``part`` in ``whole`` over the whole log."""
        self._sums[name] = self._sums[name] + part
        self._counts[name] = self._counts[name] + whole

    def largest(self, name: str, values: torch.Tensor) -> None:
        """Keeps the largest value that any rank adds, of those that are finite."""
        largest = torch.where(values.detach().isfinite(), values.detach(), -math.inf).max()
        known = self._largest.get(name)
        self._largest[name] = largest if known is None else torch.maximum(known, largest)

    def correlation(self, name: str, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Adds pairs of numbers to Pearson's correlation over all ranks; there is none where one is constant."""
        self._moments[name] = self._moments[name] + Moments.of(xs, ys)

    def take_mean(self, name: str) -> float | None:
        """Returns the mean over all ranks of the values under this name, and forgets them; ``None`` if there are none.

        A collective operation.
        """
        parts = from_every_rank((float(self._sums.pop(name, 0.0)), float(self._counts.pop(name, 0.0))))
        count = sum(part[1] for part in parts)
        return sum(part[0] for part in parts) / count if count else None

    def means(self) -> dict[str, float]:
        """Returns every mean so far on this process, and keeps the values."""
        return {
            name: float(total) / float(self._counts[name]) for name, total in self._sums.items() if self._counts[name]
        }

    def snapshot(self) -> Snapshot:
        """Returns what is collected now, to go back to when a forward pass has to be repeated."""
        sums, counts, totals = dict(self._sums), dict(self._counts), dict(self._totals)
        return Snapshot(sums, counts, totals, dict(self._largest), dict(self._moments))

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot, in place, so that all who hold this store keep sharing it."""
        self._sums = defaultdict(float, snapshot.sums)
        self._counts = defaultdict(float, snapshot.counts)
        self._totals = defaultdict(float, snapshot.totals)
        self._largest = dict(snapshot.largest)
        self._moments = defaultdict(Moments, snapshot.moments)

    def drain(self) -> dict[str, float]:
        """Returns every metric over all ranks and starts anew.

        A collective operation: every rank calls it at the same time.
        """
        own = (
            {name: (float(value), float(self._counts[name])) for name, value in self._sums.items()},
            dict(self._totals),
            {name: float(value) for name, value in self._largest.items()},
            {name: moments.numbers() for name, moments in self._moments.items()},
        )
        for collected in (self._sums, self._counts, self._totals, self._largest, self._moments):
            collected.clear()
        return _reduced(from_every_rank(own))


def _reduced(ranks: Iterable[Collected]) -> dict[str, float]:
    """Reduces what every rank collected to one number for each name."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    totals: dict[str, float] = defaultdict(float)
    largest: dict[str, float] = {}
    moments: dict[str, Moments] = defaultdict(Moments)
    for rank_means, rank_totals, rank_largest, rank_moments in ranks:
        for name, (value, count) in rank_means.items():
            sums[name] += value
            counts[name] += count
        for name, amount in rank_totals.items():
            totals[name] += amount
        for name, value in rank_largest.items():
            if value > -math.inf:  # else none of the values was finite
                largest[name] = max(value, largest.get(name, value))
        for name, numbers in rank_moments.items():
            moments[name] = moments[name] + Moments(*numbers)
    correlations = {name: merged.correlation() for name, merged in moments.items()}
    means = {name: sums[name] / counts[name] for name in sums if counts[name]}
    return means | dict(totals) | largest | {name: value for name, value in correlations.items() if value is not None}
