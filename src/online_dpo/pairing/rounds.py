"""Prompts that are answered again: which ones, and what stands in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from online_dpo.types import Feedback, Group, Pairing, Scores, Verdicts

T = TypeVar("T")


def without_pair(groups: Sequence[Group], made: Pairing) -> list[int]:
    """The places of the groups that gave no pair."""
    used = {id(pair.group) for pair in made.pairs}  # a prompt that comes twice in a step has two equal groups
    return [p for p, group in enumerate(groups) if id(group) not in used]


def latest(feedback: Feedback) -> tuple[list[Group], Scores | Verdicts]:
    """The groups of a step after the last round, and what is said of them; comparisons are those of all rounds."""
    groups, assessment = feedback.groups, feedback.said
    for again in feedback.further:
        groups = _replaced(groups, again.places, again.groups)
        assessment = _assessed_anew(assessment, again.said, again.places)
    return groups, assessment


def _assessed_anew(assessment: Scores | Verdicts, more: Scores | Verdicts, places: Sequence[int]) -> Scores | Verdicts:
    if isinstance(assessment, Verdicts):
        assert isinstance(more, Verdicts)
        preferences = _replaced(assessment.preferences, places, more.preferences)
        scores = (
            None
            if assessment.scores is None or more.scores is None
            else _scored_anew(assessment.scores, more.scores, places)
        )
        return Verdicts(preferences, assessment.duels + more.duels, assessment.unanswered + more.unanswered, scores)
    assert isinstance(more, Scores)
    return _scored_anew(assessment, more, places)


def _scored_anew(scores: Scores, more: Scores, places: Sequence[int]) -> Scores:
    return Scores(
        _replaced(scores.values, places, more.values),
        {name: _replaced(rows, places, more.by_scorer[name]) for name, rows in scores.by_scorer.items()},
        None
        if scores.normalized is None or more.normalized is None
        else _replaced(scores.normalized, places, more.normalized),
    )


def _replaced(items: Sequence[T], places: Sequence[int], new: Sequence[T]) -> list[T]:
    made = list(items)
    for place, item in zip(places, new, strict=True):
        made[place] = item
    return made


# --- strategies: distinct completions whose scores are not all equal, and a number in [0, 1) --------------------------
