"""What figures mean, in words: is a judge good enough to train on, and is one model better than another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

PEOPLE = 0.73
"""With what share of each other's comparisons people agree who label for a living (Ouyang et al. 2022,
arXiv 2203.02155, section 3.4).
"""
WEAK = 0.65
"""A judge that may well agree with fewer labels than that is said to be weak."""
BIASED = 0.1
"""Distance of the preference for the first place from 0.5 that is worth a word."""
UNANSWERED = 0.05
"""Share of pairs without an answer that is worth a word."""
Z = 1.959964


def judge_conclusion(
    agreement: Mapping[str, float] | None, unanswered: float, first_place: float | None
) -> Iterator[str]:
    """Whether a judge is good enough to train on, in sentences.

    Args:
        agreement: with labels: ``share``, its 95 % interval ``low`` to ``high``, and ``count`` labels; ``None`` without
            labels.
        unanswered: share of the pairs without an answer.
        first_place: how often the first place was preferred, over pairs asked in both orders; ``None`` if none was.
    """
    if agreement is None:
        yield "Whether it is right cannot be told: no pair with a label has an answer."
    else:
        yield _agreement(**agreement)
    if first_place is not None and abs(first_place - 0.5) > BIASED:
        place = "first" if first_place > 0.5 else "second"
        yield f"It likes the {place} place: keep `order: both`, the default, which cancels that."
    if unanswered > UNANSWERED:
        yield f"It leaves {unanswered:.0%} of the pairs unanswered; prompts without an answer are not trained on."


def _agreement(share: float, low: float, high: float, count: float) -> str:
    if high < 0.5:
        return "Do not train on it: it contradicts the labels more often than chance. Are they the wrong way round?"
    if low <= 0.5:
        more = labels_needed(share)
        how_many = "" if more is None else f" (about {more} if it goes on like this)"
        return f"Do not train on it yet: {count:.0f} labels do not tell it from chance. Ask about more pairs{how_many}."
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
    """So many that a share like this one would be told from one half; ``None`` for one half itself.

    >>> labels_needed(0.6)
    97
    """
    distance = abs(share - 0.5)
    return None if distance < 0.005 else math.ceil((Z * 0.5 / distance) ** 2)


def comparison_conclusion(
    model: str, against: str, prompts: int, win_rate: Mapping[str, Any], length_controlled: Mapping[str, Any] | None
) -> str:
    """Whether the first model's answers are better than those of the second, in a sentence or two.

    Args:
        win_rate, length_controlled: ``value``, and the 95 % interval ``low`` to ``high``.
    """
    low, high = win_rate["low"], win_rate["high"]
    if low <= 0.5 <= high:
        more = labels_needed(win_rate["value"])
        how_many = "" if more is None or more <= prompts else f" (about {more} if it goes on like this)"
        return f"No difference can be told with {prompts} prompts; more of them narrow the interval{how_many}."
    better = low > 0.5
    text = f"{model} is {'better' if better else 'worse'} than {against}: all of the interval is "
    text += f"{'above' if better else 'below'} 50 %."
    if length_controlled is not None and (length_controlled["low"] > 0.5, length_controlled["high"] < 0.5) != (
        better,
        not better,
    ):
        text += " At equal length that cannot be said: the length of the answers may be why."
    return text
