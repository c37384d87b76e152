"""Conclusions about a judge and about a comparison, in words."""

import pytest

from online_dpo.evaluation.conclusions import comparison_conclusion, judge_conclusion, labels_needed
from online_dpo.stats.intervals import wilson_interval


def of(share, count):
    low, high = wilson_interval(share, count)
    return {"share": share, "low": low, "high": high, "count": count}


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.80, 400, "Good enough to train on: right in 80% of the pairs"),
        (0.80, 40, "Good enough to train on: right in 80% of the pairs"),
        (0.75, 60, "Not yet sure: it may be as few as 63%; ask about more pairs."),
        (0.60, 400, "Better than chance, but weak: right in 60% of the pairs"),
        (0.60, 20, "Do not train on it yet: 20 labels are too few to tell it from chance. Ask about more pairs (about"),
        (0.50, 20, "Do not train on it yet: 20 labels are too few to tell it from chance. Ask about more pairs."),
        (0.30, 100, "Do not train on it: it contradicts the labels more often than chance."),
    ],
)
def test_agreement_with_labels(share, count, expected):
    [sentence] = judge_conclusion(of(share, count), 0.0, 0.5)
    assert expected in sentence and ("Not yet sure" in sentence) == ("Not yet sure" in expected)


def test_no_labels_position_bias_and_missing_answers():
    assert list(judge_conclusion(None, 0.25, 0.7)) == [
        "How often it is right is unknown: no pair with a label has an answer.",
        "It prefers the answer that is shown first: keep `order: both`, the default, which cancels this bias.",
        "It leaves 25% of the pairs unanswered; prompts without an answer are not trained on.",
    ]
    assert "shown second" in list(judge_conclusion(None, 0.0, 0.3))[1]
    assert len(list(judge_conclusion(None, 0.05, 0.6))) == 1


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("rate", "controlled", "expected"),
    [
        (interval(0.8, 0.7, 0.9), interval(0.7, 0.6, 0.8), "A is better than B: all of the interval is above 50 %."),
        (interval(0.2, 0.1, 0.3), None, "A is worse than B: all of the interval is below 50 %."),
        (
            interval(0.8, 0.7, 0.9),
            interval(0.5, 0.4, 0.6),
            "A is better than B: all of the interval is above 50 %. At equal length this does not hold: the length of "
            "the answers may be the reason.",
        ),
        (
            interval(0.55, 0.4, 0.7),
            None,
            "No significant difference with 50 prompts; more prompts narrow the interval (about 385 if the win rate "
            "stays the same).",
        ),
        (interval(0.5, 0.4, 0.6), None, "No significant difference with 50 prompts; more prompts narrow the interval."),
    ],
)
def test_comparisons(rate, controlled, expected):
    assert comparison_conclusion("A", "B", 50, rate, controlled) == expected


def test_so_many_labels_tell_a_share_from_chance():
    for share in (0.55, 0.6, 0.7):
        count = labels_needed(share)
        assert wilson_interval(share, count + 8)[0] > 0.5 > wilson_interval(share, count - 8)[0]
