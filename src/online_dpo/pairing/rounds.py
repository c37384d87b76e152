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
    """The groups of a step after the last round, and what is said of them; duels are those of all rounds."""
    groups, said = feedback.groups, feedback.said
    for again in feedback.further:
        groups = _replaced(groups, again.places, again.groups)
        said = _said_anew(said, again.said, again.places)
    return groups, said


def _said_anew(said: Scores | Verdicts, more: Scores | Verdicts, places: Sequence[int]) -> Scores | Verdicts:
    if isinstance(said, Verdicts):
        assert isinstance(more, Verdicts)
        preferences = _replaced(said.preferences, places, more.preferences)
        scores = None if said.scores is None or more.scores is None else _scored_anew(said.scores, more.scores, places)
        return Verdicts(preferences, said.duels + more.duels, said.unanswered + more.unanswered, scores)
    assert isinstance(more, Scores)
    return _scored_anew(said, more, places)


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
