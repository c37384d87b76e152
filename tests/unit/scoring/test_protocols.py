"""Optional members of scorers: what callers read of a judge, and what a user's own judge may leave out."""

from __future__ import annotations

import pytest

from online_dpo.errors import ScoringError
from online_dpo.evaluation.head_to_head import Answers, BothOrders, judge_answers
from online_dpo.scoring.judges.adapters import FunctionJudge
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.penalties import NO_PENALTIES
from online_dpo.scoring.protocols import DiagnosingScorer, FairScorer, PairwiseScorer, describe, is_fair
from online_dpo.types import Completion, Group, Prompt


class FirstPlace:
    """A user's judge with the required members alone. It always prefers the first text."""

    name = "first_place"

    def prefer(self, comparisons):
        return [0.8] * len(comparisons)


class FairFirstPlace(FirstPlace):
    is_fair = True


def group(*texts):
    return Group(Prompt("Hi", (1,), row=0), tuple(Completion((1,), (0.0,), "stop", 0, text) for text in texts))


def judge_of(order):
    return LLMJudge(model="m", base_url="http://127.0.0.1:9/v1", cache=None, order=order)


@pytest.mark.parametrize(("order", "fair"), [("both", True), ("random", True), ("given", False)])
def test_a_language_model_is_fair_unless_the_given_order_is_kept(order, fair):
    assert is_fair(judge_of(order)) is fair


def test_a_judge_that_does_not_say_so_is_not_fair():
    assert not is_fair(FirstPlace()) and not is_fair(FunctionJudge(lambda prompt, first, second: 1.0))
    assert is_fair(FairFirstPlace()) and is_fair(BothOrders(FirstPlace()))
    assert isinstance(FirstPlace(), PairwiseScorer) and not isinstance(FirstPlace(), FairScorer)


@pytest.mark.parametrize(("judge", "preference"), [(FirstPlace(), 0.5), (FairFirstPlace(), 0.8)])
def test_only_a_judge_that_is_not_fair_is_asked_in_both_orders(judge, preference):
    answers = Answers([group("a", "b")], [group("c", "d")], [()])
    [result] = judge_answers(answers, judge, NO_PENALTIES)
    assert result.preferences == pytest.approx((preference, preference))


def test_a_judge_may_say_why_an_answer_is_missing():
    assert isinstance(judge_of("both"), DiagnosingScorer) and judge_of("both").last_failure == ""
    assert not isinstance(FirstPlace(), DiagnosingScorer)


def test_a_description_is_short_whatever_the_value():
    assert describe(None) == "None" and describe(3) == "int 3" and describe([1, "a"]) == "list [1, 'a']"
    assert describe(10**5000) == "int of 16610 bits" and describe([10**5000]) == "list [of 16610 bits]"
    assert len(describe("x" * 10**6)) < 50


@pytest.mark.parametrize("preference", [10**400, 10**5000, -(10**5000), 1.5], ids=["400", "5000", "below", "1.5"])
def test_a_preference_beyond_one_is_refused_whatever_its_size(preference):
    judge = FunctionJudge(lambda prompt, first, second: preference)
    with pytest.raises(ScoringError, match="from 0 to 1"):
        judge.prefer([group("a", "b")])
