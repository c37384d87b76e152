"""Language models as judges, against a real server: preferences, orders, votes, the cache, and what goes wrong."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.errors import FeedbackStopped, ScoringError
from online_dpo.scoring.accounting import JudgeStatistics
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.judge_registry import pairwise_scorer
from online_dpo.scoring.judges.adapters import JudgeScorer
from online_dpo.scoring.judges.llm import cache as judge_cache
from online_dpo.scoring.judges.llm.client import ChatEndpoint
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter
from online_dpo.scoring.protocols import PairwiseScorer
from support.endpoint import Answer, comparison, comparisons, error, says, serving, shown

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


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


# --- preferences ------------------------------------------------------------------------------------------------------


def test_the_preference_is_the_share_of_the_verdict_letters_in_the_probability():
    with serving(lambda body, number: says("B", 0.25)) as endpoint:
        judge = judge_of(endpoint, order="given")
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx(0.25)]
    body = endpoint.seen[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/judge", 0.0, 8)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert shown(body) == ("x", "y") and "Say something." in body["messages"][0]["content"]
    assert judge.name == "judge" and isinstance(judge, PairwiseScorer)


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
    assert f"<<<REQUEST\n{text}\nREQUEST>>>" in question and shown(endpoint.seen[0].body) == ("{prompt}", "b")


# --- votes ------------------------------------------------------------------------------------------------------------


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


# --- the cache --------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice_after_a_restart(tmp_path):
    path = str(tmp_path / "new" / "cache.sqlite3")
    with serving(lambda body, number: says("?") if "9" in shown(body)[0] else longer_wins(body, number)) as endpoint:
        before = judge_of(endpoint, cache=path, max_failure_share=1.0).prefer(comparisons(10))
        assert before == [pytest.approx(0.1)] * 9 + [None] and len(endpoint.seen) == 20
        resumed = judge_of(endpoint, cache=path)
        assert resumed.prefer(comparisons(10)) == before and len(endpoint.seen) == 20
        metrics = resumed.metrics()
        assert (metrics["judge/cached"], metrics["judge/requests"], metrics["judge/unparsable"]) == (20, 0, 2)
        assert metrics["judge/position_bias"] == pytest.approx(0.5)
        for other in ({"rubric": "Shorter."}, {"model": "b"}, {"max_tokens": 3}, {"extra": {"seed": 1}}):
            judge_of(endpoint, cache=path, **other).prefer(comparisons(1))
        assert len(endpoint.seen) == 28


def test_failures_are_not_kept(tmp_path):
    path = str(tmp_path / "cache.sqlite3")
    with serving(lambda body, number: error(400) if number == 0 else says("A")) as endpoint:
        assert judge_of(endpoint, order="given", cache=path).prefer([comparison("x", "y")]) == [None]
        assert judge_of(endpoint, order="given", cache=path).prefer([comparison("x", "y")]) == [1.0]


def test_processes_share_a_cache(tmp_path):
    program = textwrap.dedent(f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("judge_cache", {judge_cache.__file__!r})
        module = sys.modules["judge_cache"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cache = module.AnswerCache(sys.argv[1])
        for number in range(300):
            cache.put(f"{{number}}", "m", module.Answer(number / 300, False, sys.argv[2], 1, 1))
            cache.put(f"{{sys.argv[2]}} {{number}}", "m", module.Answer(None, False, "", 1, 1))
    """)
    path = tmp_path / "cache.sqlite3"
    environment = os.environ | {"PYTHONPATH": str(Path(judge_cache.__file__).parents[4])}  # -S: without all the others
    commands = [[sys.executable, "-S", "-c", program, str(path), name] for name in "pqr"]
    running = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait() for process in running] == [0, 0, 0]
    cache = judge_cache.AnswerCache(str(path))
    kept = [cache.get(str(number)) for number in range(300)]
    assert [answer.p_first for answer in kept if answer] == [number / 300 for number in range(300)]
    assert all(cache.get(f"{name} {number}") is not None for name in "pqr" for number in range(300))


def test_a_file_that_is_no_cache(tmp_path):
    path = tmp_path / "cache.sqlite3"
    path.write_text("something else, and long enough to be read as a header of a database" * 20)
    with pytest.raises(ValueError, match="`cache`: .* cannot be used"):
        LLMJudge(model="m", base_url="http://localhost:1/v1", cache=str(path))


# --- limits -----------------------------------------------------------------------------------------------------------


def test_no_more_questions_at_once_than_allowed_also_from_two_threads():
    with serving(lambda body, number: says("A", 0.7, delay=0.02)) as endpoint:
        judge = judge_of(endpoint, concurrency=4)
        results: list[list[float | None]] = []
        halves = [comparisons(24)[:16], comparisons(24)[8:]]  # they share 8
        threads = [threading.Thread(target=lambda half=half: results.append(judge.prefer(half))) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[pytest.approx(0.5)] * 16] * 2
        assert endpoint.most_at_once == 4 and len(endpoint.seen) == 48
        assert judge.metrics()["judge/cached"] == 16


@pytest.mark.parametrize(("requests", "tokens", "most"), [(5, None, 5), (None, 400, 3)])
def test_rate_limits_hold_in_any_period(requests, tokens, most):
    period = 0.3
    with serving(lambda body, number: says("A", usage=(100, 20))) as endpoint:
        settings = judge_of(endpoint).settings

        async def ask():
            chat = ChatEndpoint(settings, RateLimiter(requests, tokens, period), Budget(None), JudgeStatistics(()))
            for _ in range(2 * most + 1):
                await chat.ask("x" * 300, 4, 0.0)

        wait_for(submit(ask()))
    times = [seen.time for seen in endpoint.seen]
    gaps = [later - earlier for earlier, later in zip(times, times[most:], strict=False)]
    assert min(gaps) > period - 0.05 and max(gaps) < 2 * period


def test_a_question_that_waits_for_a_limit_is_not_late():
    with serving(always_a) as endpoint:
        settings = judge_of(endpoint, question_timeout=0.2).settings

        async def ask():
            chat = ChatEndpoint(settings, RateLimiter(1, None, 0.4), Budget(None), JudgeStatistics(()))
            return [(await chat.ask("x", 4, 0.0)).text for _ in range(3)]

        assert wait_for(submit(ask())) == ["A", "A", "A"]


def test_retry_after_is_honoured():
    with serving(lambda body, number: error(429, **{"Retry-After": "0.8"}) if number == 0 else says("A")) as endpoint:
        judge = judge_of(endpoint, order="given")
        assert judge.prefer([comparison("x", "y")]) == [1.0]
        assert 0.8 <= endpoint.seen[1].time - endpoint.seen[0].time < 1.5
        assert judge.metrics()["judge/requests"] == 2


def test_the_total_cost_stays_below_the_cap():
    prices = {"input_price": 10.0, "output_price": 100.0}  # 100 tokens in and 1 out: 0.0011
    with serving(always_a) as endpoint:
        judge = judge_of(endpoint, order="given", max_cost=0.0105, concurrency=4, **prices)
        with pytest.raises(FeedbackStopped, match=r"has spent 0.00\d+, .* more than `max_cost`, 0.0105.*raise"):
            judge.prefer(comparisons(40))
        metrics = judge.metrics()
        assert metrics["judge/cost"] == pytest.approx(0.0011 * len(endpoint.seen))
        assert 0 < metrics["judge/cost"] <= 0.0105
        with pytest.raises(FeedbackStopped, match="max_cost"):
            judge.prefer(comparisons(40)[30:])
        assert judge.metrics()["judge/requests"] == 0
        assert judge_of(endpoint, order="given", max_cost=0.1, **prices).prefer(comparisons(40)) == [1.0] * 40


def test_log_probabilities_that_were_not_asked_for_are_not_read():
    with serving(lambda body, number: says("A", 0.6)) as endpoint:
        assert judge_of(endpoint, order="given").prefer([comparison("x", "y")]) == [pytest.approx(0.6)]
        assert judge_of(endpoint, order="given", logprobs=False).prefer([comparison("x", "y")]) == [1.0]


def test_processes_share_the_limits():
    limits = {"requests_per_minute": 10, "tokens_per_minute": 7000, "max_cost": 3.0, "input_price": 1.0}
    settings = JudgeSettings(model="m", base_url="http://localhost:1/v1", concurrency=3, **limits)
    assert settings.share_of(1) == settings
    share = settings.share_of(4)
    assert (share.concurrency, share.requests_per_minute, share.tokens_per_minute) == (1, 2, 1750)
    assert share.max_cost == 0.75 and share.model == "m"
    with pytest.raises(ValueError, match="`requests_per_minute` is 10, which 11 processes cannot share"):
        settings.share_of(11)
    assert JudgeSettings(model="m", base_url="http://localhost:1/v1").share_of(3).max_cost is None


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        error(500),
        error(503),
        error(408),
        Answer(b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"}),
        Answer(b'{"choices": [', 200),
        Answer({"choices": []}, 200),
        Answer({"object": "error", "message": "overloaded"}, 200),
    ],
)
def test_trouble_that_passes(trouble):
    with serving(lambda body, number: trouble if number == 0 else says("A", 0.7)) as endpoint:
        judge = judge_of(endpoint, order="given")
        assert judge.prefer([comparison("x", "y")]) == [pytest.approx(0.7)]
        assert len(endpoint.seen) == 2 and judge.metrics()["judge/failed"] == 0


def test_trouble_that_stays_is_a_missing_preference():
    def respond(body, number):
        return error(500, "overloaded") if "1" in shown(body)[0] + shown(body)[1] else longer_wins(body, number)

    with serving(respond) as endpoint:
        judge = judge_of(endpoint, attempts=2, max_failure_share=1.0)
        assert judge.prefer(comparisons(3)) == [pytest.approx(0.1), None, pytest.approx(0.1)]
        metrics = judge.metrics()
        assert (metrics["judge/failed"], metrics["judge/requests"], metrics["judge/unparsable"]) == (2, 8, 0)


def test_a_question_that_the_endpoint_does_not_take_is_not_repeated():
    with serving(lambda body, number: error(400, "too long for the model")) as endpoint:
        assert judge_of(endpoint, order="given").prefer([comparison("x", "y")]) == [None]
        assert len(endpoint.seen) == 1


@pytest.mark.parametrize("text", ["", "Both are fine.", "Verdict: C", "A or B", "a"])
def test_an_answer_without_verdict_is_no_guess(text):
    with serving(lambda body, number: says(text)) as endpoint:
        judge = judge_of(endpoint, order="given")
        assert judge.prefer([comparison("x", "y")]) == [None]
        assert judge.metrics()["judge/unparsable"] == 1


@pytest.mark.parametrize("answer", [says("A", delay=3.0), says("A", drip=0.05)])
def test_a_slow_answer_is_given_up_and_asked_for_again(answer):
    with serving(lambda body, number: answer if number == 0 else says("A")) as endpoint:
        started = time.monotonic()
        assert judge_of(endpoint, order="given", request_timeout=0.3).prefer([comparison("x", "y")]) == [1.0]
        assert 0.3 < time.monotonic() - started < 2.0 and len(endpoint.seen) == 2


def test_a_hanging_endpoint_takes_no_longer_than_a_question_may():
    with serving(lambda body, number: says("A", delay=5.0)) as endpoint:
        judge = judge_of(endpoint, request_timeout=0.2, question_timeout=0.7, max_failure_share=1.0)
        started = time.monotonic()
        assert judge.prefer(comparisons(3)) == [None] * 3
        assert time.monotonic() - started < 1.5
        assert judge.metrics()["judge/failed"] == 6


def test_a_retry_after_that_is_too_long_is_not_waited_for():
    with serving(lambda body, number: error(429, **{"Retry-After": "3600"})) as endpoint:
        started = time.monotonic()
        assert judge_of(endpoint, order="given", question_timeout=5).prefer([comparison("x", "y")]) == [None]
        assert time.monotonic() - started < 1.0 and len(endpoint.seen) == 1


def test_nobody_listens(caplog):
    """That is said at the first attempt, once, long before the last one has failed."""
    judge = LLMJudge(model="m", base_url="http://127.0.0.1:9/v1", attempts=2, cache=None, order="given")
    assert judge.prefer([comparison("x", "y"), comparison("y", "z")]) == [None, None]
    [said] = [record.getMessage() for record in caplog.records if "in trouble" in record.getMessage()]
    assert "no connection to http://127.0.0.1:9/v1" in said and said.endswith("Questions are tried 2 times.")


def test_too_many_failures_stop_with_counts_and_the_last_cause():
    with serving(lambda body, number: error(400, "the context is full") if number % 3 == 0 else says("A")) as endpoint:
        judge = judge_of(endpoint, order="given", concurrency=1, max_failure_share=0.3)
        with pytest.raises(FeedbackStopped, match=r"`judge` .* 7 of the last 20 questions.*\(0.3\).*context is full"):
            judge.prefer(comparisons(40))
        assert len(endpoint.seen) <= 22  # the next question may have begun
        tolerant = judge_of(endpoint, order="given", concurrency=1, max_failure_share=0.4)
        assert tolerant.prefer(comparisons(40)).count(None) in (13, 14)
    assert issubclass(FeedbackStopped, ScoringError)


@pytest.mark.parametrize(
    "refusal", [error(401, "bad key"), error(404, "no such model"), error(429, "pay first", code="insufficient_quota")]
)
def test_a_refusal_stops_at_once(refusal):
    with serving(lambda body, number: refusal) as endpoint:
        judge = judge_of(endpoint, order="given", concurrency=1)
        with pytest.raises(FeedbackStopped, match="org/judge at http://127.*(bad key|no such model|pay first)"):
            JudgeScorer(judge, None).prefer(comparisons(9))  # pyright: ignore[reportArgumentType]
        assert len(endpoint.seen) <= 2  # the next question may have begun


def test_the_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOUSE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "cache.sqlite3"

    def respond(body, number):
        """Repeats the key in everything that it says."""
        answers = [error(500, KEY), error(400, f"logprobs: {KEY}"), says("A"), error(400, KEY), error(401, KEY)]
        return answers[min(number, 4)]

    with serving(respond) as endpoint:
        judge = judge_of(endpoint, order="given", api_key_env="HOUSE_KEY", cache=str(path), concurrency=1)
        assert judge.prefer(comparisons(2)) == [1.0, None]
        with pytest.raises(FeedbackStopped) as caught:
            judge.prefer(comparisons(3))
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in endpoint.seen)
    assert "***" in str(caught.value)
    with pytest.raises(TypeError):
        pickle.dumps(judge)
    shown_texts = [str(caught.value), repr(judge), repr(judge.settings), repr(vars(judge)), repr(judge.metrics())]
    shown_texts += [caplog.text, *(file.read_bytes().decode("latin-1") for file in tmp_path.iterdir())]
    assert not any(KEY in text for text in shown_texts)


def test_a_key_is_needed_outside_ones_own_network_only(monkeypatch):
    with pytest.raises(ValueError, match="no API key for https://api.openai.com/v1: set .* OPENAI_API_KEY"):
        LLMJudge(model="m")
    with pytest.raises(ValueError, match="variable MY_KEY"):
        LLMJudge(model="m", api_key_env="MY_KEY", base_url="https://example.org/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    LLMJudge(model="m", cache=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "`model` is empty"),
        ({"order": "second"}, "`order` must be one of both, random, given"),
        ({"inconsistent": "skip", "order": "given"}, "needs both orders"),
        ({"concurrency": 0}, "`concurrency` must be 1 or more"),
        ({"request_timeout": 0.0}, "`request_timeout` must be above 0"),
        ({"max_cost": 1.0}, "`max_cost` needs `input_price`"),
        ({"max_failure_share": 2.0}, "between 0 and 1"),
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"base_url": f"https://me:{KEY}@example.org/v1"}, "holds a user name"),
        ({"base_url": f"https://example.org/v1?key={KEY}"}, "holds a user name, password or query"),
        ({"rubric": "r", "rubric_file": "f"}, "not both"),
        ({"template": "nowhere.txt"}, "there is no file 'nowhere.txt'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        LLMJudge(**{"model": "m", "base_url": "http://localhost:1/v1", "cache": None, **settings})
    assert KEY not in str(caught.value)


def test_templates_and_rubrics_from_files(tmp_path):
    template, rubric = tmp_path / "mine.txt", tmp_path / "rubric.txt"
    template.write_text(
        '{rubric} {"json": {prompt}}\n<<<ANSWER A\n{first}\nANSWER A>>>\n<<<ANSWER B\n{second}\nANSWER B>>>'
    )
    rubric.write_text("Prefer {first}.\n")
    with serving(longer_wins) as endpoint:
        judge = judge_of(endpoint, order="given", template=str(template), rubric_file=str(rubric))
        assert judge.prefer([comparison("aa", "b", prompt="P")]) == [pytest.approx(0.9)]
    text = "<<<ANSWER A\naa\nANSWER A>>>\n<<<ANSWER B\nb\nANSWER B>>>"
    assert endpoint.seen[0].body["messages"][0]["content"] == f'Prefer {{first}}. {{"json": P}}\n{text}'
    template.write_text("{prompt} {first}")
    with pytest.raises(ValueError, match="no place for {rubric}, {second}"):
        judge_of(endpoint, template=str(template), rubric="r")


def test_extra_fields_of_the_request():
    with serving(always_a) as endpoint:
        extra = {"max_tokens": None, "max_completion_tokens": 50, "seed": 3}
        judge_of(endpoint, order="given", extra=extra, logprobs=False).prefer([comparison("x", "y")])
    body = endpoint.seen[0].body
    assert body.keys() == {"model", "messages", "temperature", "max_completion_tokens", "seed"}
    assert (body["max_completion_tokens"], body["seed"]) == (50, 3)
