"""What a judge does when an endpoint fails, answers nothing useful, or refuses; and wrong settings."""

from __future__ import annotations

import gc
import logging
import pickle
import time

import pytest

from online_dpo.errors import FeedbackStopped, ScoringError
from online_dpo.scoring.judges.adapters import JudgeScorer
from online_dpo.scoring.judges.llm.judge import LLMJudge
from support.endpoint import Answer, comparison, comparisons, error, says, serving, shown
from support.llm_judges import always_a, judge_of, longer_wins

KEY = "sk-secret-0123456789"


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


@pytest.mark.parametrize("answer", [says("A", delay=120.0), says("A", drip=0.1)])
def test_a_slow_answer_is_given_up_and_asked_for_again(answer):
    with serving(lambda body, number: answer if number == 0 else says("A")) as endpoint:
        started = time.monotonic()
        assert judge_of(endpoint, order="given", request_timeout=1.0).prefer([comparison("x", "y")]) == [1.0]
        assert 1.0 < time.monotonic() - started < 60.0 and len(endpoint.seen) == 2


def test_a_hanging_endpoint_takes_no_longer_than_a_question_may():
    with serving(lambda body, number: says("A", delay=120.0)) as endpoint:
        judge = judge_of(endpoint, request_timeout=0.2, question_timeout=0.7, max_failure_share=1.0)
        started = time.monotonic()
        assert judge.prefer(comparisons(3)) == [None] * 3
        assert time.monotonic() - started < 60.0
        assert judge.metrics()["judge/failed"] == 6


def test_a_retry_after_that_is_too_long_is_not_waited_for():
    with serving(lambda body, number: error(429, **{"Retry-After": "3600"})) as endpoint:
        started = time.monotonic()
        assert judge_of(endpoint, order="given", question_timeout=5).prefer([comparison("x", "y")]) == [None]
        assert time.monotonic() - started < 60.0 and len(endpoint.seen) == 1


def test_an_endpoint_that_does_not_listen(caplog):
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
        ({"base_url": f"https://example.org/v1?key={KEY}"}, "holds a user name, a password or a key"),
        ({"base_url": "https://example.org/v1?version=2"}, "holds a query"),
        ({"base_url": "http://host:99999/v1"}, "is no address"),
        ({"base_url": "http://[::1/v1"}, "is no address"),
        ({"api_key_env": KEY}, "`api_key_env` is not the name of an environment variable"),
        ({"extra": {"headers": {"X-Api-Key": KEY}}}, "`extra` holds `X-Api-Key`. Put the key into"),
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


def test_questions_that_nobody_waits_for_any_more_print_no_traceback(caplog):
    """asyncio logs errors of tasks that nobody has looked at, once they are collected."""
    delays = [0.0, 0.05, 0.1, 0.2]
    with serving(lambda body, number: error(401, "bad key", code=None) if number else says("A")) as endpoint:
        for delay in delays:
            judge = judge_of(endpoint, concurrency=4)
            with pytest.raises(FeedbackStopped, match="bad key"):
                judge.prefer(comparisons(20))
            time.sleep(delay)
            del judge
            gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
