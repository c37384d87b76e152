"""Resampling rounds: which prompts are sampled again, and the state of a step after all rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from online_dpo.types import Feedback, Group, Pairing, Scores, Verdicts

T = TypeVar("T")

NOT_SAID = "not_said"
"""The reason of a group without a pair where a method from outside has only counted its groups."""


def without_pair(groups: Sequence[Group], pairing: Pairing) -> list[int]:
    """The indices of the groups that gave no pair."""
    # By identity: a prompt that occurs twice in a step has two groups, which may be equal.
    used = {id(pair.group) for pair in pairing.pairs}
    return [p for p, group in enumerate(groups) if id(group) not in used]


def reasons(groups: Sequence[Group], pairing: Pairing) -> list[str | None]:
    """Why each group gave no pair; ``None`` for those that gave one."""
    without = set(without_pair(groups, pairing))
    [counted, *others] = list(pairing.dropped) or [NOT_SAID]
    unsaid = counted if not others and pairing.dropped[counted] == len(without) else NOT_SAID
    return [pairing.reasons.get(p, unsaid) if p in without else None for p in range(len(groups))]


def latest(feedback: Feedback) -> tuple[list[Group], Scores | Verdicts]:
    """The groups of a step and their assessment after the last resampling round; counts of comparisons are sums."""
    groups, assessment = feedback.groups, feedback.said
    for again in feedback.further:
        groups = _replaced(groups, again.places, again.groups)
        assessment = _updated_assessment(assessment, again.said, again.places)
    return groups, assessment


def _updated_assessment(
    assessment: Scores | Verdicts, new: Scores | Verdicts, indices: Sequence[int]
) -> Scores | Verdicts:
    """The assessment with that of the groups at ``indices`` replaced by the new one."""
    if isinstance(assessment, Verdicts):
        assert isinstance(new, Verdicts)
        preferences = _replaced(assessment.preferences, indices, new.preferences)
        scores = (
            None
            if assessment.scores is None or new.scores is None
            else _updated_scores(assessment.scores, new.scores, indices)
        )
        return Verdicts(
            preferences,
            assessment.duels + new.duels,
            assessment.unanswered + new.unanswered,
            scores,
            _replaced_if_there(assessment.comparisons, indices, new.comparisons),
            _replaced_if_there(assessment.penalties, indices, new.penalties),
        )
    assert isinstance(new, Scores)
    return _updated_scores(assessment, new, indices)


def _updated_scores(scores: Scores, new: Scores, indices: Sequence[int]) -> Scores:
    """The scores with those of the groups at ``indices`` replaced by the new ones."""
    return Scores(
        _replaced(scores.values, indices, new.values),
        {name: _replaced(rows, indices, new.by_scorer[name]) for name, rows in scores.by_scorer.items()},
        None
        if scores.normalized is None or new.normalized is None
        else _replaced(scores.normalized, indices, new.normalized),
        scores.weights,
        {name: _replaced(rows, indices, new.relative[name]) for name, rows in scores.relative.items()},
        _replaced_if_there(scores.penalties, indices, new.penalties),
    )


def _replaced_if_there(items: Sequence[T], indices: Sequence[int], new: Sequence[T]) -> list[T]:
    """As `_replaced`; empty where either is, which says nothing of its groups."""
    return _replaced(items, indices, new) if items and new else []


def _replaced(items: Sequence[T], indices: Sequence[int], new: Sequence[T]) -> list[T]:
    """A copy of ``items`` with those at ``indices`` replaced by ``new``."""
    copy = list(items)
    for index, item in zip(indices, new, strict=True):
        copy[index] = item
    return copy
