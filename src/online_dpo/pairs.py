"""Groups and what scorers said of them, to pairs. Every group ends as one pair or in one counted reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from online_dpo.types import Group, Pair, Scores

MISSING_SCORE = "missing_score"
NO_ANSWER = "no_answer"
TIE = "tie"
IDENTICAL = "identical"


def pairs_from_scores(
    groups: Sequence[Group], scores: Scores, tie_policy: str = "skip"
) -> tuple[list[Pair], Counter[str]]:
    """Best against worst of each group, and how many groups were dropped for which reason.

    A completion without a score takes part in no pair; a group with fewer than two scored completions is dropped as
    ``missing_score``, one whose best and worst score are equal as ``tie`` (or, with ``tie_policy="first"``, gives its
    first two scored completions as chosen and rejected), one whose two completions have the same tokens as
    ``identical``. Between equal scores the earlier completion is the chosen one and the later the rejected one.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for group, values in zip(groups, scores.values, strict=True):
        scored = [(score, k) for k, score in enumerate(values) if score is not None]
        if len(scored) < 2:
            dropped[MISSING_SCORE] += 1
            continue
        best_score, best = max(scored, key=lambda item: (item[0], -item[1]))
        worst_score, worst = min(scored, key=lambda item: (item[0], -item[1]))
        if best_score == worst_score:
            if tie_policy == "skip":
                dropped[TIE] += 1
                continue
            best, worst = scored[0][1], scored[1][1]
        _add(Pair(group, best, worst, best_score, worst_score), pairs, dropped)
    return pairs, dropped


def pairs_from_ranks(groups: Sequence[Group], ranks: Sequence[int]) -> tuple[list[Pair], Counter[str]]:
    """A judge's choice for each group of two: the index of the better completion, or -1 (dropped as ``no_answer``)."""
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for group, rank in zip(groups, ranks, strict=True):
        if rank == -1:
            dropped[NO_ANSWER] += 1
        else:
            _add(Pair(group, chosen=rank, rejected=1 - rank), pairs, dropped)
    return pairs, dropped


def _add(pair: Pair, pairs: list[Pair], dropped: Counter[str]) -> None:
    if pair.chosen_completion.token_ids == pair.rejected_completion.token_ids:
        dropped[IDENTICAL] += 1
    else:
        pairs.append(pair)
