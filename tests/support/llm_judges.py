"""A judge that asks an endpoint of a test, and answers that endpoints give."""

from __future__ import annotations

from online_dpo.scoring.judges.llm.judge import LLMJudge
from support.endpoint import says, shown


def judge_of(endpoint, **settings):
    return LLMJudge(**{"model": "org/judge", "base_url": endpoint.url, "cache": None, **settings})


def longer_wins(body, number):
    """Sure to 0.9 of the longer answer, wherever it stands."""
    first, second = shown(body)
    return says("A", 0.9) if len(first) > len(second) else says("B", 0.1)


def first_wins(body, number):
    """Prefers the first place with 0.7, whatever stands there."""
    return says("A", 0.7)


def always_a(body, number):
    return says("A")
