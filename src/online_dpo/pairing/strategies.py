"""Strategies: distinct completions whose scores are not all equal, and a number in [0, 1), to pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

Scored = tuple[float, int]
"""A completion's score and its index in the group."""


def best_worst(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    return [(_best(scored), min(scored, key=lambda item: (item[0], -item[1])))]


def best_random(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    lower = _below_the_best(scored)
    return [(_best(scored), lower[int(draw * len(lower))])]


def best_mean_minus_two_sigma(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """The worst of many samples says little about what the policy usually does wrong (arXiv 2502.16825)."""
    scores = [score for score, _ in scored]
    target = statistics.fmean(scores) - 2 * statistics.pstdev(scores)
    return [(_best(scored), min(_below_the_best(scored), key=lambda item: (abs(item[0] - target), -item[1])))]


def all_pairs(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    return [(better, worse) for better in scored for worse in scored if better[0] > worse[0]]


def widest_allowed(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """All pairs, the widest first; what is trained is the first one that nothing objects to."""
    return sorted(all_pairs(scored, draw), key=lambda pair: (pair[1][0] - pair[0][0], pair[0][1], -pair[1][1]))


Strategy = Callable[[Sequence[Scored], float], list[tuple[Scored, Scored]]]
STRATEGIES: dict[str, Strategy] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "best_mean_minus_two_sigma": best_mean_minus_two_sigma,
    "all_pairs": all_pairs,
    "widest_allowed": widest_allowed,
}
FIRST_ALLOWED = ("widest_allowed",)
"""Strategies that look for another pair where there is an objection to the first."""


def _best(scored: Sequence[Scored]) -> Scored:
    return max(scored, key=lambda item: (item[0], -item[1]))


def _below_the_best(scored: Sequence[Scored]) -> list[Scored]:
    best = _best(scored)
    return [item for item in scored if item[0] < best[0]]
