"""Rewards over HTTP, against a real server."""

from __future__ import annotations

import datetime
import math
import time

import pytest

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.errors import FeedbackStopped, ScoringError
from online_dpo.scoring.registry import build_scorers
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.scoring.rewards.http import HTTPReward
from support.endpoint import Answer, comparison, comparisons, error, serving


def lengths(body, number):
    return Answer({"scores": [float(len(text)) for text in body["completions"]]})


def test_scores_come_back_in_their_places():
    with serving(lengths, "/length") as endpoint:
        reward = HTTPReward(endpoint.url, batch_size=3)
        chat = [{"role": "user", "content": "Q"}]
        groups = [comparison("a", "bb", prompt="P", topic="x"), comparison("ccc", "dddd", prompt=chat)]
        assert reward.name == "length"
        assert reward.score(groups) == [[1.0, 2.0], [3.0, 4.0]] and reward.score([]) == []
    first = next(seen.body for seen in endpoint.seen if len(seen.body["prompts"]) == 3)
    assert first == {"prompts": ["P", "P", chat], "completions": ["a", "bb", "ccc"]}


def test_columns_are_sent_and_batches_wait_beside_each_other(tmp_path):
    with serving(lambda body, number: Answer({"scores": body["weight"]}, delay=0.5)) as endpoint:
        reward = HTTPReward(endpoint.url, "weight", columns=["weight"], batch_size=2, concurrency=4)
        groups = [comparison("a", "b", weight=float(i)) for i in range(8)] + [comparison("a", "b")]
        scorers = build_scorers([reward, reward], None, OnlineDPOConfig(str(tmp_path), use_cpu=True), state=None)
        scores = score_groups(groups, scorers, [1.0, 1.0])
        assert endpoint.most_at_once == 4
    assert scores.values == [[2.0 * i, 2.0 * i] for i in range(8)] + [[None, None]]
    assert len(endpoint.seen) == 9  # listed twice, asked once


def test_values_are_sent_as_they_are_and_dates_as_text():
    day = datetime.datetime(2024, 1, 31, 10)
    given = [18, 2.5, "007", True, None, {"a": [1, None]}, day, day.date()]
    with serving(lengths) as endpoint:
        reward = HTTPReward(endpoint.url, columns=["x"], batch_size=100)
        reward.score([comparison("a", "bb", x=value) for value in given])
        with pytest.raises(ScoringError, match="is to be sent bytes b'x', which JSON does not have"):
            reward.score([comparison("a", "bb", x=b"x")])
    [seen] = endpoint.seen
    expected = [*given[:6], "2024-01-31T10:00:00", "2024-01-31"]
    assert repr(seen.body["x"][::2]) == repr(expected)


def test_what_fails_is_missing_and_what_passes_is_tried_again():
    def respond(body, number):
        if "2" in body["completions"]:
            return error(422)
        return [error(503), Answer(b"<html>")][number] if number < 2 else lengths(body, number)

    with serving(respond) as endpoint:
        reward = HTTPReward(endpoint.url, batch_size=2, concurrency=1)
        scores = reward.score(comparisons(4))
    assert scores[0] == [1.0, 10.0] and scores[3] == [1.0, 10.0]
    assert all(math.isnan(score) for score in scores[2] if score is not None)
    assert len(endpoint.seen) == 6
    gone = HTTPReward(endpoint.url, attempts=1)  # nothing listens any more
    assert score_groups(comparisons(1), [gone]).values == [[None, None]]


def test_time_is_limited():
    with serving(lambda body, number: Answer(lengths(body, number).body, drip=0.2)) as endpoint:
        reward = HTTPReward(endpoint.url, timeout=0.3, attempts=1)
        started = time.monotonic()
        assert all(math.isnan(score) for score in reward.score(comparisons(1))[0] if score is not None)
        assert time.monotonic() - started < 40


def test_it_stops_when_refused_or_when_too_much_fails(monkeypatch):
    monkeypatch.setenv("HOUSE_KEY", "sk-secret")
    with serving(lambda body, number: error(401, "bad key sk-secret")) as endpoint:
        with pytest.raises(FeedbackStopped, match=r"refuses to score: status 401.*bad key \*\*\*"):
            HTTPReward(endpoint.url, api_key_env="HOUSE_KEY").score(comparisons(1))
        assert endpoint.seen[0].headers["authorization"] == "Bearer sk-secret"
    with serving(lambda body, number: error(400, "no")) as endpoint:
        reward = HTTPReward(endpoint.url, batch_size=2)
        reward.score(comparisons(9))
        with pytest.raises(FeedbackStopped, match=r"Reward `.*` gave no usable answer to 20 of the last 20 questions"):
            reward.score(comparisons(1))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="must begin with http"):
        HTTPReward("localhost:8000")
    with pytest.raises(ValueError, match="`columns` holds prompts"):
        HTTPReward("http://localhost", columns=["prompts"])
    with pytest.raises(ValueError, match="`api_key_env`: the environment variable NO_SUCH_KEY is not set"):
        HTTPReward("http://localhost", api_key_env="NO_SUCH_KEY")
