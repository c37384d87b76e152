"""What a judge asks, and what it does not: its cache, its limits, and the cap on its cost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from online_dpo.config.llm_judge import JudgeSettings
from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.accounting import JudgeStatistics
from online_dpo.scoring.event_loop import submit, wait_for
from online_dpo.scoring.judges.llm import cache as judge_cache
from online_dpo.scoring.judges.llm.client import ChatEndpoint
from online_dpo.scoring.judges.llm.rate_limit import Budget, RateLimiter
from support.endpoint import comparison, comparisons, error, says, serving, shown
from support.llm_judges import always_a, judge_of, longer_wins

# the cache ------------------------------------------------------------------------------------------------------------


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


# limits ---------------------------------------------------------------------------------------------------------------


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
