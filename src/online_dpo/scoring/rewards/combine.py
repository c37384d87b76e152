"""From what the user passes as rewards to scorers, and from several scorers to one number for each completion."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Sequence
from fractions import Fraction

import torch

from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, at_row, foreign
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import AsyncPointwiseScorer, PointwiseScorer, describe
from online_dpo.types import Group, Scores

Values = list[list[float | None]]


def score_groups(
    groups: Sequence[Group],
    scorers: Sequence[PointwiseScorer],
    weights: Sequence[float] | None = None,
    penalties: Penalties = NO_PENALTIES,
    normalization: str | Sequence[str] = "none",
) -> Scores:
    """The weighted sum of all scorers for each completion, less its penalties.

    ``normalization`` is that of all scorers, or one for each: with ``group``, the numbers that pairs are formed by have
    in place of the scorer's own number its distance from the mean of those that the scorer gave in the group, in their
    standard deviations. The penalties are taken from that sum as well.

    A score is missing (``None``), never a number, where any scorer gave ``nan`` or an infinity. A scorer that gave
    ``None`` for every completion of a group does not apply to that prompt and is left out there; ``None`` for only some
    means that those are missing. Where no scorer applies, all are missing. ``by_scorer`` keeps what each scorer said,
    numbers that are not finite as ``None``, under its name (``f``, ``f_2`` where names repeat).

    ``async`` scorers wait beside each other and beside the others.

    Raises:
        ValueError: the numbers of weights and scorers differ.
        ScoringError: a scorer failed, or returned another shape than its groups have.
    """
    if weights is None:
        weights = [1.0] * len(scorers)
    if len(weights) != len(scorers):
        raise ValueError(f"There are {len(weights)} weights for {len(scorers)} scorers. Give one for each.")
    raw = _run(groups, scorers)
    kinds = [normalization] * len(scorers) if isinstance(normalization, str) else normalization
    values = _sums(groups, raw, weights, penalties)
    normalized = None
    if any(kind == "group" for kind in kinds):
        relative = [
            [_in_deviations(row) for row in said] if kind == "group" else said
            for said, kind in zip(raw, kinds, strict=True)
        ]
        normalized = [
            [None if value is None else score for value, score in zip(reported, row, strict=True)]
            for reported, row in zip(values, _sums(groups, relative, weights, penalties), strict=True)
        ]
    by_scorer = {
        name: [[_finite(value) for value in row] for row in scores]
        for name, scores in zip(unique_names(scorers), raw, strict=True)
    }
    return Scores(values, by_scorer, normalized)


def _sums(groups: Sequence[Group], said: Sequence[Values], weights: Sequence[float], penalties: Penalties) -> Values:
    """``said`` is what each scorer says of all groups."""
    return [
        [
            _total([values[p] for values in said], k, weights, penalties.of(completion))
            for k, completion in enumerate(group.completions)
        ]
        for p, group in enumerate(groups)
    ]


def _in_deviations(row: list[float | None]) -> list[float | None]:
    """The finite numbers of a group as their distance from their mean in standard deviations; 0 where all are equal.

    Scorers that contradict each other cancel: of two numbers the one is 1 and the other -1, exactly, however far from 0
    both are. So the mean is a fraction, and the result is rounded.
    """
    finite = [_finite(value) for value in row]
    numbers = [number for number in finite if number is not None]
    deviation = statistics.pstdev(numbers) if numbers else 0.0
    if deviation == 0:
        return [value if number is None else 0.0 for value, number in zip(row, finite, strict=True)]
    mean = statistics.mean(map(Fraction, numbers))
    return [
        value if number is None else round(float((Fraction(number) - mean) / Fraction(deviation)), 9)
        for value, number in zip(row, finite, strict=True)
    ]


def _total(rows: list[list[float | None]], k: int, weights: Sequence[float], penalty: float) -> float | None:
    """Completion ``k`` of one group; ``rows`` is what each scorer said about the group."""
    applying = [(row[k], weight) for row, weight in zip(rows, weights, strict=True) if any(v is not None for v in row)]
    numbers = [(value, weight) for value, weight in applying if value is not None]
    if not applying or len(numbers) < len(applying):
        return None
    if not all(math.isfinite(value) for value, _ in numbers):
        return None
    return _finite(sum(value * weight for value, weight in numbers) - penalty)


def _run(groups: Sequence[Group], scorers: Sequence[PointwiseScorer]) -> list[Values]:
    """What each scorer says; one that is listed twice is run once."""
    distinct = {id(scorer): scorer for scorer in scorers}
    waiting = {
        key: submit(scorer.score_async(groups))
        for key, scorer in distinct.items()
        if isinstance(scorer, AsyncPointwiseScorer) and scorer.is_async
    }
    results: dict[int, Values] = {}
    try:
        for key, scorer in sorted(distinct.items(), key=lambda item: item[0] in waiting):  # those that wait last
            with foreign(f"Scorer `{scorer.name}`", lambda: among_rows(groups)):
                said = wait_for(waiting[key]) if key in waiting else scorer.score(groups)
                results[key] = [list(row) for row in said]
            _check_scores(scorer.name, results[key], groups)
    finally:
        for future in waiting.values():
            future.cancel()
    return [results[id(scorer)] for scorer in scorers]


def _check_scores(name: str, scores: Values, groups: Sequence[Group]) -> None:
    returned, shape = [len(row) for row in scores], [len(group.completions) for group in groups]
    if returned != shape:
        raise ScoringError(
            f"Scorer `{name}` returned lists of {returned} scores for groups of {shape} completions. Return one list "
            "for each group, with one score for each completion."
        )
    for group, row in zip(groups, scores, strict=True):
        wrong = [value for value in row if value is not None and not isinstance(value, (numbers.Real, torch.Tensor))]
        if wrong:
            raise ScoringError(f"Scorer `{name}` gave {describe(wrong[0])}; wanted: numbers {at_row(group.prompt)}.")


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def unique_names(scorers: Sequence[PointwiseScorer]) -> list[str]:
    """Their names in metrics: ``f``, ``f_2`` where names repeat."""
    names: list[str] = []
    for scorer in scorers:
        name, count = scorer.name, 1
        while name in names:
            count += 1
            name = f"{scorer.name}_{count}"
        names.append(name)
    return names
