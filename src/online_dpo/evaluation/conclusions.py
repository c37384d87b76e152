"""Conclusions from figures, in words: is a judge good enough to train on, and is one model better than another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

PEOPLE = 0.73
"""Agreement of professional labellers with each other (Ouyang et al. 2022, arXiv 2203.02155, section 3.4)."""
WEAK = 0.65
"""A judge is called weak if its agreement with labels may be below this share."""
BIASED = 0.1
"""Smallest distance of the position bias from 0.5 that is mentioned."""
UNANSWERED = 0.05
"""Smallest share of pairs without an answer that is mentioned."""
Z = 1.959964
"""The normal distribution's quantile for a 95 % interval."""


def judge_conclusion(
    agreement: Mapping[str, float] | None, unanswered: float, first_place: float | None
) -> Iterator[str]:
    """State in sentences whether a judge is good enough to train on.

    Args:
        agreement: agreement with labels: the ``share``, its 95 % interval ``low`` to ``high``, and the ``count`` of
            labels; ``None`` without labels.
        unanswered: share of the pairs without an answer.
        first_place: mean probability given to the answer that was shown first, over pairs asked in both orders;
            ``None`` if there are none.
    """
    if agreement is None:
        yield "How often it is right is unknown: no pair with a label has an answer."
    else:
        yield _agreement(**agreement)
    if first_place is not None and abs(first_place - 0.5) > BIASED:
        place = "first" if first_place > 0.5 else "second"
        yield f"It prefers the answer that is shown {place}: keep `order: both`, the default, which cancels this bias."
    if unanswered > UNANSWERED:
        yield f"It leaves {unanswered:.0%} of the pairs unanswered; prompts without an answer are not trained on."


def _agreement(share: float, low: float, high: float, count: float) -> str:
    if high < 0.5:
        return "Do not train on it: it contradicts the labels more often than chance. Are they the wrong way round?"
    if low <= 0.5:
        more = labels_needed(share)
        how_many = "" if more is None else f" (about {more} if the agreement stays the same)"
        return (
            f"Do not train on it yet: {count:.0f} labels are too few to tell it from chance. Ask about more "
            f"pairs{how_many}."
        )
    if high < PEOPLE and low < WEAK:
        return (
            f"Better than chance, but weak: right in {share:.0%} of the pairs, where people agree with each other in "
            f"about {PEOPLE:.0%}. A better rubric or model is worth more than more training."
        )
    sure = "" if low >= WEAK else f" Not yet sure: it may be as few as {low:.0%}; ask about more pairs."
    return (
        f"Good enough to train on: right in {share:.0%} of the pairs, where people agree with each other in about "
        f"{PEOPLE:.0%}.{sure}"
    )


def labels_needed(share: float) -> int | None:
    """The number of labels with which this share would differ significantly from 0.5; ``None`` for 0.5 itself.

    >>> labels_needed(0.6)
    97
    """
    distance = abs(share - 0.5)
    return None if distance < 0.005 else math.ceil((Z * 0.5 / distance) ** 2)


def comparison_conclusion(
    model: str, against: str, prompts: int, win_rate: Mapping[str, Any], length_controlled: Mapping[str, Any] | None
) -> str:
    """State in one or two sentences whether the first model's answers are better than the second model's.

    Args:
        win_rate, length_controlled: the ``value`` and its 95 % interval ``low`` to ``high``.
    """
    low, high = win_rate["low"], win_rate["high"]
    if low <= 0.5 <= high:
        more = labels_needed(win_rate["value"])
        how_many = "" if more is None or more <= prompts else f" (about {more} if the win rate stays the same)"
        return f"No significant difference with {prompts} prompts; more prompts narrow the interval{how_many}."
    better = low > 0.5
    text = f"{model} is {'better' if better else 'worse'} than {against}: all of the interval is "
    text += f"{'above' if better else 'below'} 50 %."
    if length_controlled is not None and (length_controlled["low"] > 0.5, length_controlled["high"] < 0.5) != (
        better,
        not better,
    ):
        text += " At equal length this does not hold: the length of the answers may be the reason."
    return text
