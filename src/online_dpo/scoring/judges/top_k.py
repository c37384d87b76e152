"""A judge for the few completions that have the highest scores: it finds the best, the scores the worst.

Scores cost little and are right about what is bad; a judge tells good answers apart. Of a group's K completions only
the ``top`` highest by score meet each other, in a knock-out of ``top`` - 1 comparisons, and the winner meets the
completion with the lowest score: ``top`` comparisons at most, whatever K is. Each round of all groups is one call of
the judge.
"""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.scoring.judges.tournament import ComparisonCounter, Contest, Rounds, distinct, hold, neighbours
from online_dpo.scoring.penalties import NO_PENALTIES, Penalties
from online_dpo.scoring.protocols import PairwiseScorer
from online_dpo.types import Group, Preference, Scores, Verdicts


def judge_the_top(
    groups: Sequence[Group],
    scores: Scores,
    judge: PairwiseScorer,
    top: int,
    penalties: Penalties = NO_PENALTIES,
) -> Verdicts:
    """The judge's best of the ``top`` highest scores of each group, preferred to the lowest score of the others.

    A completion without a score takes no part. Of those with the same text that have ended alike, the first stands for
    all. Between equal scores the earlier is the higher. They meet in the order of their scores: where a comparison ends
    even, the higher score goes on; where it has no answer, neither does. A group has no preference where fewer than two
    have a score, where nobody is left, or where the last comparison has no answer. The last comparison is not fought
    again by two who have met.
    """
    ask = ComparisonCounter(judge, penalties)
    preferences: list[Preference | None] = [None] * len(groups)
    contests: dict[int, Contest] = {}
    for p, (group, row) in enumerate(zip(groups, scores.ranking, strict=True)):
        scored = {k: score for k, score in enumerate(row) if score is not None}
        entrants = sorted(distinct(group, list(scored)), key=scored.__getitem__, reverse=True)
        if len(entrants) > 1:
            contests[p] = _contest(entrants, top)
        elif len(scored) > 1:
            first, second, *_ = scored
            preferences[p] = Preference(first, second, 0.5)  # all texts the same
    for p, outcome in hold(groups, contests, ask).items():
        preferences[p] = outcome
    return Verdicts(preferences, ask.duels, ask.unanswered, scores)


def _contest(entrants: list[int], top: int) -> Contest:
    """``entrants``: from the highest score to the lowest."""
    rounds = Rounds()
    left = entrants[:top]
    while len(left) > 1:
        yield from rounds.play(neighbours(left))
        left = rounds.survivors(left, 0)
    if not left:
        return None
    [best] = left
    worst = entrants[-1] if entrants[-1] != best else entrants[-2]
    return (yield from rounds.last(best, worst))
