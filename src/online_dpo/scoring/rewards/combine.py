"""From several scorers to one score for each completion: weighted sums, normalisation, penalties."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from online_dpo.distributed.waiting import waiting_for
from online_dpo.errors import ScoringError
from online_dpo.foreign import among_rows, at_row, foreign
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import AsyncPointwiseScorer, PointwiseScorer, describe, is_own
from online_dpo.scoring.time_limit import await_in_time, call_in_time
from online_dpo.types import Group, Scores

Values = list[list[float | None]]


def score_groups(
    groups: Sequence[Group],
    scorers: Sequence[PointwiseScorer],
    weights: Sequence[float] | None = None,
    penalties: Penalties = NO_PENALTIES,
    normalization: str | Sequence[str] = "none",
    on_scores: Callable[[PointwiseScorer, Values], None] = lambda scorer, scores: None,
) -> Scores:
    """Score each completion: the weighted sum of all scorers, minus the completion's penalties.

    ``normalization`` applies to all scorers, or has one entry for each. With "group", pairs are formed by the scorer's
    z-scores within the group (distance from the group's mean, in its standard deviations) in place of its raw scores.
    The same weights and penalties apply to that sum. Reported scores stay raw.

    A score is missing (``None``) if any scorer gave ``nan`` or an infinity. A scorer that gave ``None`` for every
    completion of a group does not apply to that prompt and is left out of the sum; ``None`` for only some completions
    means that their scores are missing. If no scorer applies, all scores are missing. ``by_scorer`` has each scorer's
    raw scores, with ``None`` for numbers that are not finite, under the scorer's name (``f``, ``f_2`` if names repeat);
    ``weights`` and ``relative`` have the same names.

    ``async`` scorers run at the same time as each other and as the other scorers. ``on_scores`` is called with each
    scorer and its raw scores.

    Raises:
        ValueError: the numbers of weights and scorers differ.
        ScoringError: a scorer failed, or returned scores whose shape is not that of the groups.
    """
    if weights is None:
        weights = [1.0] * len(scorers)
    if len(weights) != len(scorers):
        raise ValueError(f"There are {len(weights)} weights for {len(scorers)} scorers. Give one for each.")
    raw = _run(groups, scorers)
    for scorer, scores in {id(scorer): (scorer, scores) for scorer, scores in zip(scorers, raw, strict=True)}.values():
        on_scores(scorer, scores)
    kinds = [normalization] * len(scorers) if isinstance(normalization, str) else normalization
    values = _sums(groups, raw, weights, penalties)
    names, relative, normalized = unique_names(scorers), raw, None
    if any(kind == "group" for kind in kinds):
        relative = [_normalized(scores, kind) for scores, kind in zip(raw, kinds, strict=True)]
        normalized = _where_reported(values, _sums(groups, relative, weights, penalties))
    return Scores(
        values,
        {name: _all_finite(scores) for name, scores in zip(names, raw, strict=True)},
        normalized,
        weights=dict(zip(names, weights, strict=True)),
        relative={n: _all_finite(r) for n, r, kind in zip(names, relative, kinds, strict=True) if kind == "group"},
        penalties=penalties.parts(groups),
    )


def _normalized(scores: Values, kind: str) -> Values:
    return [_z_scores(row) for row in scores] if kind == "group" else scores


def _where_reported(reported: Values, normalized: Values) -> Values:
    """The normalized sums, ``None`` where the reported one is missing."""
    return [
        [None if value is None else score for value, score in zip(row, normalized_row, strict=True)]
        for row, normalized_row in zip(reported, normalized, strict=True)
    ]


def _sums(
    groups: Sequence[Group], by_scorer: Sequence[Values], weights: Sequence[float], penalties: Penalties
) -> Values:
    """The weighted sums minus penalties; ``by_scorer`` has each scorer's scores of all groups."""
    return [
        [
            _total([scores[p] for scores in by_scorer], k, weights, penalties.of(completion))
            for k, completion in enumerate(group.completions)
        ]
        for p, group in enumerate(groups)
    ]


def _z_scores(row: list[float | None]) -> list[float | None]:
    """The distance of each finite score of a group from their mean, in standard deviations; 0 if all are equal.

    The mean is an exact fraction and the result is rounded, so that two scorers that contradict each other cancel
    exactly: of two scores one becomes 1 and the other -1, however large both are.
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
    """The score of completion ``k`` of one group; ``rows`` has each scorer's scores of the group."""
    applying = [(row[k], weight) for row, weight in zip(rows, weights, strict=True) if any(v is not None for v in row)]
    numbers = [(value, weight) for value, weight in applying if value is not None]
    if not applying or len(numbers) < len(applying):
        return None
    if not all(math.isfinite(value) for value, _ in numbers):
        return None
    return _finite(sum(value * weight for value, weight in numbers) - penalty)


def _run(groups: Sequence[Group], scorers: Sequence[PointwiseScorer]) -> list[Values]:
    """The scores of each scorer; a scorer that is listed twice runs once."""
    distinct = {id(scorer): scorer for scorer in scorers}
    waiting = {
        key: submit(_in_time(scorer, groups))
        for key, scorer in distinct.items()
        if isinstance(scorer, AsyncPointwiseScorer) and scorer.is_async
    }
    results: dict[int, Values] = {}
    try:
        # Asynchronous scorers come last: they wait on a network while the others compute.
        for key, scorer in sorted(distinct.items(), key=lambda item: item[0] in waiting):
            with foreign(f"Scorer `{scorer.name}`", lambda: among_rows(groups), waits=key not in waiting):
                scores = wait_for(waiting[key]) if key in waiting else _scores(scorer, groups)
                results[key] = [list(row) for row in scores]
            _check_scores(scorer.name, results[key], groups)
    finally:
        for future in waiting.values():
            future.cancel()
    return [results[id(scorer)] for scorer in scorers]


def _scores(scorer: PointwiseScorer, groups: Sequence[Group]) -> Values:
    """The scores of a plain scorer, with the time limit. Ours put it around what they call."""
    if is_own(scorer):
        return scorer.score(groups)
    return call_in_time(lambda: scorer.score(groups), f"Scorer `{scorer.name}`", lambda: among_rows(groups))


async def _in_time(scorer: AsyncPointwiseScorer, groups: Sequence[Group]) -> Values:
    """The scores of an asynchronous scorer, with the time limit, as in `_scores`."""
    who = f"Scorer `{scorer.name}`"
    with waiting_for(who):
        if is_own(scorer):
            return await scorer.score_async(groups)
        return await await_in_time(scorer.score_async(groups), who, lambda: among_rows(groups))


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


def _all_finite(scores: Values) -> Values:
    return [[_finite(value) for value in row] for row in scores]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def unique_names(scorers: Sequence[PointwiseScorer]) -> list[str]:
    """The names of the scorers in metrics: ``f``, then ``f_2`` if the name repeats."""
    names: list[str] = []
    for scorer in scorers:
        name, count = scorer.name, 1
        while name in names:
            count += 1
            name = f"{scorer.name}_{count}"
        names.append(name)
    return names
