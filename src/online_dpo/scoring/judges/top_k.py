"""Scores and a judge combined: the judge finds the best among the completions with the highest scores.

Scores are cheap and reliable about bad completions; a judge is better at telling good ones apart. Of a group's K
completions, the ``top`` with the highest scores are compared in a knock-out tournament of ``top`` - 1 comparisons, and
the winner is compared with the completion that has the lowest score: at most ``top`` comparisons for any K. Each round
of all groups is one call of the judge.
"""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.scoring.judges.tournament import (
    ComparisonCounter,
    Rounds,
    Tournament,
    adjacent_pairs,
    distinct_completions,
    run_tournaments,
)
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
    """Find a preference for each group: the judge's best of the ``top`` highest scores over the lowest score.

    A completion without a score takes no part. Of completions with the same text and finish reason, only the first
    takes part. Of two equal scores, the earlier counts as higher. Completions are compared in the order of their
    scores: if a comparison ends even, the higher score goes on; if it has no answer, neither does. The last comparison
    is not repeated if the two were compared before. A group has no preference if fewer than two completions have a
    score, if no completion is left, or if the last comparison has no answer.
    """
    compare = ComparisonCounter(judge, penalties)
    preferences: list[Preference | None] = [None] * len(groups)
    tournaments: dict[int, Tournament] = {}
    for p, (group, row) in enumerate(zip(groups, scores.ranking, strict=True)):
        scored = {k: score for k, score in enumerate(row) if score is not None}
        entrants = sorted(distinct_completions(group, list(scored)), key=scored.__getitem__, reverse=True)
        if len(entrants) > 1:
            tournaments[p] = _best_of_top_against_worst(entrants, top)
        elif len(scored) > 1:
            first, second, *_ = scored
            preferences[p] = Preference(first, second, 0.5)  # all texts are the same
    results, made = run_tournaments(groups, tournaments, compare)
    for p, preference in results.items():
        preferences[p] = preference
    return Verdicts(preferences, compare.comparisons, compare.unanswered, scores, made, penalties.parts(groups))


def _best_of_top_against_worst(entrants: list[int], top: int) -> Tournament:
    """A knock-out tournament; ``entrants`` are sorted from the highest score to the lowest."""
    rounds = Rounds()
    remaining = entrants[:top]
    while len(remaining) > 1:
        yield from rounds.play(adjacent_pairs(remaining))
        remaining = rounds.winners(remaining)
    if not remaining:
        return None
    [best] = remaining
    worst = entrants[-1] if entrants[-1] != best else entrants[-2]
    return (yield from rounds.final(best, worst))
