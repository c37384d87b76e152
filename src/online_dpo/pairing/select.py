"""Forming pairs from groups and their scores or preferences. Each group gives pairs or one counted drop reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.pairing.strategies import STRATEGIES, Scored
from online_dpo.stats.preference import sigmoid
from online_dpo.types import Group, Pair, Pairing, Preference, Prompt, Scores

MISSING_SCORE = "missing_score"
NO_ANSWER = "no_answer"
CONTRADICTION = "contradiction"
TIE = "tie"
IDENTICAL = "identical"
MARGIN = "margin"
LENGTH_RATIO = "length_ratio"

Draw = Callable[[Prompt], float]
"""Returns a random number in [0, 1) for a prompt, the same at every call within a step."""

Candidate = tuple[Pair, float | None]
"""A pair, and the difference of the scores by which it was formed; ``None`` with a judge."""


@dataclass(frozen=True)
class Selection:
    """The options for forming pairs. They are fields of the configuration; ``strategy`` is ``pair_selection`` there.

    >>> Selection(strategy="all_pairs", min_margin=0.5)
    """

    strategy: str = "best_worst"
    tie_policy: str = "skip"
    min_margin: float | None = None
    max_margin: float | None = None
    max_length_ratio: float | None = None
    margin_weighting: bool = False
    label_temperature: float | None = None

    @classmethod
    def from_config(cls, args: OnlineDPOConfig) -> Selection:
        """The options of a configuration."""
        return cls(
            strategy=args.pair_selection,
            tie_policy=args.tie_policy,
            min_margin=args.min_margin,
            max_margin=args.max_margin,
            max_length_ratio=args.max_length_ratio,
            margin_weighting=args.margin_weighting,
            label_temperature=args.label_temperature,
        )


def pairs_from_scores(
    groups: Sequence[Group], scores: Scores, selection: Selection | None = None, draw: Draw = lambda prompt: 0.0
) -> Pairing:
    """Forms the pairs that the selection's strategy picks from each group.

    Pairs are chosen, and margins measured, by ``scores.ranking``; ``scores.values`` are stored in the pairs.

    A completion without a score is in no pair. Of several completions with the same tokens, only the first with a score
    is used. Between equal scores, the earlier completion is the chosen one and the later one the rejected one.

    A group is dropped for one of these reasons: ``missing_score``: fewer than two completions have a score. ``tie``:
    all scores are equal (with ``tie_policy="first"`` its first two completions are the pair). ``identical``: all
    completions have the same tokens. ``margin`` or ``length_ratio``: the limits of the selection exclude all its pairs.

    Args:
        draw: the source of random numbers for strategies that choose at random.
    """
    selection = selection or Selection()
    pairing = Pairing()
    for place, (group, ranking, values) in enumerate(zip(groups, scores.ranking, scores.values, strict=True)):
        scored = [(score, k) for k, score in enumerate(ranking) if score is not None]
        distinct = _distinct(scored, group)
        if len(scored) < 2:
            pairing.drop(place, MISSING_SCORE)
        elif _all_equal(scored) and selection.tie_policy == "skip":
            pairing.drop(place, TIE)
        elif len(distinct) < 2:
            pairing.drop(place, IDENTICAL)
        elif not _all_equal(distinct):
            picked = STRATEGIES[selection.strategy].pick(distinct, draw(group.prompt))
            _add(place, [_candidate(group, values, *pick, selection) for pick in picked], pairing, selection)
        elif selection.tie_policy == "first":
            _add(place, [_candidate(group, values, distinct[0], distinct[1], selection)], pairing, selection)
        else:
            pairing.drop(place, TIE)
    return pairing


def pairs_from_preferences(
    groups: Sequence[Group],
    preferences: Sequence[Preference | None],
    selection: Selection | None = None,
    scores: Scores | None = None,
) -> Pairing:
    """Forms the pair that a judge chose in each group, with the judge's probability, and the scores if there are any.

    A group is dropped for one of these reasons: ``no_answer``: the judge gave none. ``missing_score``: scores decide
    which completions the judge is given, and fewer than two completions have a score. ``identical``: both completions
    have the same tokens. ``tie``: the probability is 0.5 (with ``tie_policy="first"`` the pair is trained with
    probability 1). ``contradiction``: the judge prefers the completion that it found the worst to the one that it found
    the best.
    """
    selection = selection or Selection()
    pairing = Pairing()
    for p, (group, preference) in enumerate(zip(groups, preferences, strict=True)):
        values = [None] * len(group.completions) if scores is None else scores.values[p]
        if preference is None:
            unscored = scores is not None and sum(score is not None for score in scores.ranking[p]) < 2
            pairing.drop(p, MISSING_SCORE if unscored else NO_ANSWER)
            continue
        chosen, rejected, probability = preference.chosen, preference.rejected, preference.probability
        pair = Pair(group, chosen, rejected, values[chosen], values[rejected], probability)
        if pair.chosen_completion.token_ids == pair.rejected_completion.token_ids:
            pairing.drop(p, IDENTICAL)
        elif probability == 0.5 and selection.tie_policy == "skip":
            pairing.drop(p, TIE)
        elif probability < 0.5:
            pairing.drop(p, CONTRADICTION)
        else:
            _add(p, [(replace(pair, probability=1.0) if probability == 0.5 else pair, None)], pairing, selection)
    return pairing


def _all_equal(scored: Sequence[Scored]) -> bool:
    return len({score for score, _ in scored}) == 1


def _distinct(scored: Sequence[Scored], group: Group) -> list[Scored]:
    first: dict[tuple[int, ...], Scored] = {}
    for item in scored:
        first.setdefault(group.completions[item[1]].token_ids, item)
    return list(first.values())


def _candidate(
    group: Group, values: Sequence[float | None], chosen: Scored, rejected: Scored, selection: Selection
) -> Candidate:
    pair = Pair(group, chosen[1], rejected[1], values[chosen[1]], values[rejected[1]])
    margin = chosen[0] - rejected[0]
    if selection.margin_weighting:
        pair = replace(pair, weight=margin)
    if selection.label_temperature is not None:
        pair = replace(pair, probability=sigmoid(margin / selection.label_temperature))
    return pair, margin


def _add(place: int, candidates: Sequence[Candidate], pairing: Pairing, selection: Selection) -> None:
    """Adds the pairs of the group at a place that the limits of the selection allow; without any, its first reason."""
    objections = [_objection(pair, margin, selection) for pair, margin in candidates]
    kept = [pair for (pair, _), objection in zip(candidates, objections, strict=True) if objection is None]
    reasons = [objection for objection in objections if objection is not None]
    if kept and STRATEGIES[selection.strategy].first_allowed:
        pairing.pairs.append(kept[0])
    elif kept:
        pairing.pairs.extend(kept)
        pairing.leave_out(place, reasons)
    else:
        pairing.drop(place, reasons[0])


def _objection(pair: Pair, margin: float | None, selection: Selection) -> str | None:
    ratio = selection.max_length_ratio
    low, high = selection.min_margin or 0.0, selection.max_margin or math.inf
    if margin is not None and not low <= margin <= high:
        return MARGIN
    short, long = sorted(len(c.token_ids) for c in (pair.chosen_completion, pair.rejected_completion))
    return LENGTH_RATIO if ratio is not None and long > ratio * short else None
