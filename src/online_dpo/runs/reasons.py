"""Why a group gave no pair, in words."""

from __future__ import annotations

REASONS = {
    "tie": "all scores are equal, or the judge has no preference",
    "identical": "all completions are the same",
    "missing_score": "fewer than two completions have a score",
    "no_answer": "the judge gave no answer",
    "contradiction": "the judge contradicts itself",
    "margin": "no pair has a margin within the limits",
    "length_ratio": "no pair has lengths within the limits",
    "resampled": "the prompt was answered again",
    "not_said": "a method from outside does not say of which prompts its reasons are",
    "invalid_prompt": "the prompt could not be used",
}
"""The reasons that a group has in the record, and those under which metrics count it."""


def in_words(reason: str) -> str:
    """A reason for people, with its name; the name alone where it is not one of ours.

    >>> in_words("no_answer")
    'no_answer (the judge gave no answer)'
    """
    return f"{reason} ({REASONS[reason]})" if reason in REASONS else reason
