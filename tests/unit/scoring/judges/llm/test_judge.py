"""Language models as judges, against a real server: preferences, orders and votes."""

from __future__ import annotations

import re

import pytest

from online_dpo.scoring.judge_registry import pairwise_scorer
from online_dpo.scoring.judges.adapters import JudgeScorer
from online_dpo.scoring.protocols import PairwiseScorer
from support.endpoint import comparison, comparisons, error, says, serving, shown
from support.llm_judges import always_a, first_wins, judge_of, longer_wins

# preferences ----------------------------------------------------------------------------------------------------------


def test_the_preference_is_the_share_of_the_verdict_letters_in_the_probability():
    with serving(lambda body, number: says("B", 0.25)) as endpoint:
        judge = judge_of(endpoint, order="given")
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx(0.25)]
    body = endpoint.seen[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/judge", 0.0, 8)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert shown(body) == ("x", "y") and "Say something." in body["messages"][0]["content"]
    assert judge.name == "judge" and isinstance(judge, PairwiseScorer)


@pytest.mark.smoke
def test_a_preference_for_a_place_cancels_in_both_orders_and_is_measured():
    with serving(first_wins) as endpoint:
        given = judge_of(endpoint, order="given")
        assert given.prefer(comparisons(5)) == [pytest.approx(0.7)] * 5
        both = judge_of(endpoint)
        assert both.prefer(comparisons(5)) == [pytest.approx(0.5)] * 5
    metrics = both.metrics()
    assert metrics["judge/position_bias"] == pytest.approx(0.7) and metrics["judge/disagreement_rate"] == 1.0
    assert given.metrics()["judge/position_bias"] == pytest.approx(0.7)
    assert "judge/disagreement_rate" not in given.metrics()


def test_a_fair_judge_agrees_with_itself():
    with serving(longer_wins) as endpoint:
        judge = judge_of(endpoint)
        assert judge.prefer([comparison("long one", "s"), comparison("s", "long one")]) == [
            pytest.approx(0.9),
            pytest.approx(0.1),
        ]
        metrics = judge.metrics()
        assert metrics["judge/position_bias"] == pytest.approx(0.5) and metrics["judge/disagreement_rate"] == 0.0
        # The second comparison asks what the first one asked.
        assert (metrics["judge/requests"], metrics["judge/cached"]) == (2, 2)
        assert (metrics["judge/input_tokens"], metrics["judge/output_tokens"]) == (200, 2)
        assert judge.metrics()["judge/requests"] == 0


def test_the_judge_in_trls_form():
    with serving(longer_wins) as endpoint:
        judge = judge_of(endpoint)
        assert judge.judge(["p", "p", "p"], [["long", "s"], ["s", "long"], ["same", "same"]]) == [0, 1, -1]
        scorer = JudgeScorer(judge, None)  # pyright: ignore[reportArgumentType]
        assert scorer.rank([comparison("s", "long")]) == [1] and scorer.prefer([comparison("s", "long")]) == [0.0]
        assert pairwise_scorer(judge, None) is judge  # pyright: ignore[reportArgumentType]


def test_equal_texts_are_even_and_not_asked_and_duplicates_are_asked_once():
    with serving(longer_wins) as endpoint:
        judge = judge_of(endpoint, order="given")
        asked = [
            comparison("a", "a"),
            comparison("aa", "b"),
            comparison("aa", "b"),
            comparison("aa", "b", prompt="Another."),
        ]
        assert judge.prefer(asked) == [0.5, pytest.approx(0.9), pytest.approx(0.9), pytest.approx(0.9)]
        assert judge.prefer([]) == []
    assert len(endpoint.seen) == 2


def test_random_order_depends_on_the_texts_only():
    with serving(first_wins) as endpoint:
        judge = judge_of(endpoint, order="random")
        preferences = judge.prefer(comparisons(40))
        firsts = [shown(seen.body)[0] for seen in endpoint.seen]
        turned = [comparison(*(c.text for c in reversed(one.completions))) for one in comparisons(40)]
        assert judge.prefer(turned) == [pytest.approx(1 - p) for p in preferences]
        assert len(endpoint.seen) == 40
        again = judge_of(endpoint, order="random")
        assert again.prefer(comparisons(40)) == preferences
    assert sorted(shown(seen.body)[0] for seen in endpoint.seen[40:]) == sorted(firsts)
    assert 8 < sum(first.endswith("more") for first in firsts) < 32


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"role": "user", "content": "Hi {first}"}], "Hi {first}"),
        ([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], "system: S\n\nuser: Hi"),
    ],
)
def test_conversations_are_shown_with_their_roles(content, text):
    with serving(longer_wins) as endpoint:
        judge_of(endpoint, order="given").prefer([comparison("{prompt}", "b", prompt=content)])
    question = endpoint.seen[0].body["messages"][0]["content"]
    assert re.search(rf"<<<REQUEST (\w+)\n{re.escape(text)}\nREQUEST \1>>>", question)
    assert shown(endpoint.seen[0].body) == ("{prompt}", "b")


# votes ----------------------------------------------------------------------------------------------------------------


def test_without_log_probabilities_answers_are_votes():
    with serving(lambda body, number: says("AAB"[number])) as endpoint:
        judge = judge_of(endpoint, order="given", votes=3)
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx(2 / 3)]
    assert [seen.body["temperature"] for seen in endpoint.seen] == [0.7] * 3


def test_a_final_answer_is_not_asked_for_again():
    with serving(first_wins) as endpoint:
        assert judge_of(endpoint, order="given", votes=5).prefer([comparison("x", "y")]) == [pytest.approx(0.7)]
    assert len(endpoint.seen) == 1


def test_reasoned_answers_are_read_at_their_verdict():
    reasons = ["A is short.\nVerdict: B", "B is longer.\nVerdict: A"]
    p = [0.2, 0.6]
    with serving(lambda body, number: says(reasons[number], p[number])) as endpoint:
        judge = judge_of(endpoint, order="given", template="reasoned", votes=2)
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx(0.4)]
    assert endpoint.seen[0].body["max_tokens"] == 1024


def test_an_endpoint_that_refuses_log_probabilities_is_asked_without(caplog):
    def respond(body, number):
        return error(400, "logprobs are not supported with this model") if "logprobs" in body else says("A")

    with serving(respond) as endpoint:
        judge = judge_of(endpoint, order="given", concurrency=1)
        assert judge.prefer(comparisons(3)) == [1.0] * 3
        assert len(endpoint.seen) == 4 and judge.metrics()["judge/failed"] == 0
    assert "its answers are votes" in caplog.text


@pytest.mark.parametrize(("policy", "preference", "requests"), [("soften", 0.5, 2), ("skip", None, 2)])
def test_orders_that_contradict_each_other(policy, preference, requests):
    with serving(always_a) as endpoint:
        judge = judge_of(endpoint, inconsistent=policy)
        assert judge.prefer([comparison("x", "y")]) == [preference]
        assert len(endpoint.seen) == requests and judge.metrics()["judge/disagreement_rate"] == 1.0


def test_further_votes_are_asked_until_the_orders_agree():
    def respond(body, number):
        """Prefers the first place at temperature 0, and then `x`."""
        return says("A") if body["temperature"] == 0 else says("A" if shown(body)[0] == "x" else "B")

    with serving(respond) as endpoint:
        judge = judge_of(endpoint, inconsistent="revote", revotes=5)
        # x first: A, A, A; y first: A, B, B: its mean passes one half with the second further vote.
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx((1 + 2 / 3) / 2)]
        assert len(endpoint.seen) == 6
    with serving(always_a) as endpoint:
        assert judge_of(endpoint, inconsistent="revote", revotes=2).prefer([comparison("x", "y")]) == [0.5]
        assert len(endpoint.seen) == 6
    with serving(first_wins) as endpoint:  # what was read from log-probabilities would be the same again
        assert judge_of(endpoint, inconsistent="revote").prefer([comparison("x", "y")]) == [pytest.approx(0.5)]
        assert len(endpoint.seen) == 2
