"""`reward_timeout`: what takes too long ends with an error that names it, the rows and the seconds."""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import ContextVar

import pytest
import torch

from online_dpo.errors import ScoringError
from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.judges.adapters import FunctionJudge, JudgeScorer
from online_dpo.scoring.notes import noting
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.scoring.time_limit import call_in_time, time_limit
from support import tiny
from support.busy import soon
from support.endpoint import comparisons

GROUPS = comparisons(2)
TOO_LONG = "took longer than `reward_timeout` allows, 0.2 seconds"


def options(seconds=0.2):
    return lambda: AssessmentOptions(timeout=seconds)


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


def hangs(completions, **_):
    time.sleep(120)
    return lengths(completions)


async def hangs_in_await(completions, **_):
    await asyncio.sleep(120)
    return lengths(completions)


async def blocks(completions, **_):
    time.sleep(3)
    return lengths(completions)


class OwnScorer:
    name = "mine"

    def score(self, groups):
        time.sleep(120)


class OwnJudge:
    name = "mine"

    def prefer(self, comparisons):
        time.sleep(120)


class RankingJudge:
    def judge(self, prompts, completion_pairs, shuffle_order=True):
        time.sleep(120)


def slow_judge(prompt, first, second):
    time.sleep(120)


async def slow_async_judge(prompt, first, second):
    await asyncio.sleep(120)


def fails(assessor, message):
    start = time.monotonic()
    with pytest.raises(ScoringError) as caught:
        assessor.assess(GROUPS)
    assert str(caught.value) == message
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("scorer", "who"),
    [
        (FunctionScorer(hangs), "Reward function `hangs`"),
        (FunctionScorer(hangs_in_await), "Reward function `hangs_in_await`"),
        (OwnScorer(), "Scorer `mine`"),
    ],
)
def test_a_reward_that_hangs_is_given_up(scorer, who):
    seconds = fails(Assessor([scorer], options=options()), f"{who} {TOO_LONG} {rows()}. It was given up.")
    assert 0.2 <= seconds < 60


@pytest.mark.parametrize(
    ("judge", "who"),
    [
        (FunctionJudge(slow_judge), "Judge `slow_judge`"),
        (FunctionJudge(slow_async_judge), "Judge `slow_async_judge`"),
        (JudgeScorer(RankingJudge(), tiny.tokenizer()), "Judge `RankingJudge`"),
        (OwnJudge(), "Judge `mine`"),
    ],
)
def test_a_judge_that_hangs_is_given_up(judge, who):
    fails(Assessor(judge=judge, options=options()), f"{who} {TOO_LONG} {rows()}. It was given up.")


def rows():
    return "(row 0: 'Say something.')"


def test_a_function_that_blocks_the_event_loop_is_told_apart():
    message = (
        "Something that blocks took longer than `reward_timeout` allows, 0.2 seconds, in an `async` function (Reward "
        "function `blocks`). An `async` function must `await`, as with `asyncio.sleep` in place of `time.sleep`."
    )
    fails(Assessor([FunctionScorer(blocks)], options=options()), message)
    time.sleep(2)  # the loop is shared


def test_calls_in_time_give_what_they_give_without_a_limit():
    scorers = [FunctionScorer(lengths), FunctionScorer(quick)]
    limited, free = (Assessor(scorers, options=options(seconds)).assess(GROUPS) for seconds in (60, None))
    assert limited == free


async def quick(completions, **_):
    await asyncio.sleep(0.01)
    return lengths(completions)


def test_an_error_is_raised_as_without_a_limit():
    def raises(completions, **_):
        raise KeyError("colour")

    fails(
        Assessor([FunctionScorer(raises)], options=options()),
        f"Reward function `raises` raised KeyError: 'colour' {rows()}",
    )


def test_without_a_limit_a_function_runs_in_the_calling_thread():
    assert call_in_time(threading.current_thread, "f") is threading.main_thread()


def test_all_calls_of_a_thread_are_made_in_the_same_other_thread():
    """A connection to a database, for one, may be used in one thread alone."""
    with time_limit(60):
        first, second = (call_in_time(threading.current_thread, "f") for _ in range(2))
        assert first is second is not threading.main_thread() and first.daemon
        with pytest.raises(ScoringError), time_limit(0.05):
            call_in_time(lambda: time.sleep(0.3), "f")
        third = call_in_time(threading.current_thread, "f")
    assert third is not first
    soon(lambda: not first.is_alive())
    assert third.is_alive()


def test_the_other_thread_has_the_state_of_the_calling_one():
    variable = ContextVar("variable", default=0)
    variable.set(3)

    def state():
        return (
            variable.get(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        )

    with time_limit(60):
        assert call_in_time(state, "f") == (3, True, False, False)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert call_in_time(state, "f") == (3, False, False, torch.bfloat16)
        with torch.inference_mode():
            assert call_in_time(state, "f") == (3, False, True, False)


def test_a_function_logs_metrics_from_the_other_thread():
    def logs(completions, log_metric, **_):
        log_metric("seen", len(completions))
        return lengths(completions)

    with noting() as notes:
        Assessor([FunctionScorer(logs)], options=options(5)).assess(GROUPS)
    assert notes.metrics == {"seen": [4.0]}
