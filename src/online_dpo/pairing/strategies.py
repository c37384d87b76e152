"""Strategies: which completions of a group become pairs, by their scores."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from online_dpo.config.registry import Registry

Scored = tuple[float, int]
"""A completion's score and its index in the group."""

Pick = Callable[[Sequence[Scored], float], list[tuple[Scored, Scored]]]
"""A function that picks the pairs, each as (chosen, rejected). It is given distinct completions whose scores are not
all equal, and a random number in [0, 1), a new one for each prompt and step.
"""


@dataclass(frozen=True)
class Strategy:
    """A function that picks pairs, and how many of them are used.

    ``first_allowed``: only the first pair is used that no limit (`min_margin` ...) excludes; otherwise all of those.
    """

    pick: Pick
    first_allowed: bool = False


STRATEGIES: Registry[Strategy] = Registry("strategy")


def strategy(name: str, *, first_allowed: bool = False) -> Callable[[Pick], Pick]:
    """Registers a function that picks pairs; ``pair_selection: name`` in a configuration then selects it.

    >>> @strategy("mine")
    ... def mine(scored, draw): return [(max(scored), min(scored))]

    Raises:
        RegistryError: the name is taken.
    """
    return STRATEGIES.decorator(name, lambda pick: Strategy(pick, first_allowed))


@strategy("best_worst")
def best_worst(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """Pairs the completion with the highest score with the one with the lowest."""
    return [(_best(scored), min(scored, key=lambda item: (item[0], -item[1])))]


@strategy("best_random")
def best_random(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """Pairs the completion with the highest score with a random one of those with a lower score."""
    lower = _below_the_best(scored)
    return [(_best(scored), lower[int(draw * len(lower))])]


@strategy("best_mean_minus_two_sigma")
def best_mean_minus_two_sigma(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """Pairs the completion with the highest score with the one whose score is closest to the mean minus two standard
    deviations.

    With many samples, the worst one is an outlier, which says little about typical errors (arXiv 2502.16825).
    """
    scores = [score for score, _ in scored]
    target = statistics.fmean(scores) - 2 * statistics.pstdev(scores)
    return [(_best(scored), min(_below_the_best(scored), key=lambda item: (abs(item[0] - target), -item[1])))]


@strategy("all_pairs")
def all_pairs(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """Pairs each completion with each one that has a lower score."""
    return [(better, worse) for better in scored for worse in scored if better[0] > worse[0]]


@strategy("widest_allowed", first_allowed=True)
def widest_allowed(scored: Sequence[Scored], draw: float) -> list[tuple[Scored, Scored]]:
    """All pairs, sorted by decreasing margin; the first one that no limit excludes is used."""
    return sorted(all_pairs(scored, draw), key=lambda pair: (pair[1][0] - pair[0][0], pair[0][1], -pair[1][1]))


def _best(scored: Sequence[Scored]) -> Scored:
    return max(scored, key=lambda item: (item[0], -item[1]))


def _below_the_best(scored: Sequence[Scored]) -> list[Scored]:
    best = _best(scored)
    return [item for item in scored if item[0] < best[0]]
