"""Python functions as scorers: what they receive, what they may return, how async ones run."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from online_dpo.errors import ScoringError
from online_dpo.scoring.notes import nothing_noted, noting
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.types import Completion, Group, Prompt

ASK = [{"role": "user", "content": "Hi"}]


def group(content, texts, **columns) -> Group:
    completions = tuple(
        Completion(tuple(range(10, 10 + len(text))), tuple(-1.0 for _ in text), "stop", 0, text) for text in texts
    )
    return Group(Prompt(content, (1, 2), row=0, columns=columns), completions)


GROUPS = [group("p", ["a", "bb"], answer=3), group("q", ["ccc", "dddd"], answer=4)]


def returning(value):
    def reward(**kwargs):
        return value

    return FunctionScorer(reward)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_arguments_are_flat_lists_in_prompt_order():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0, 1, 2, 3]

    state = SimpleNamespace(global_step=7)
    assert FunctionScorer(reward, state=lambda: state).score(GROUPS) == [[0.0, 1.0], [2.0, 3.0]]
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["p", "p", "q", "q"],
        "completions": ["a", "bb", "ccc", "dddd"],
        "completion_ids": [[10], [10, 11], [10, 11, 12], [10, 11, 12, 13]],
        "answer": [3, 3, 4, 4],
        "trainer_state": state,
    }


def test_notes_are_collected_for_those_who_score():
    def reward(completions, log_metric, log_extra):
        log_metric("length", np.float32(len(completions)))
        log_metric("length", 0)
        log_extra("first", (text[0] for text in completions))
        return [0.0] * len(completions)

    async def slow(completions, log_extra, **kwargs):
        await asyncio.sleep(0)
        log_extra("last", [text[-1] for text in completions])
        kwargs["log_metric"]("slow", torch.tensor(0.5))
        return [0.0] * len(completions)

    scorers = [FunctionScorer(reward), FunctionScorer(slow)]
    with noting() as notes:
        score_groups(GROUPS, scorers)
        with nothing_noted():
            score_groups(GROUPS[:1], scorers)
        with noting() as others:
            score_groups(GROUPS[:1], scorers)
    score_groups(GROUPS, scorers)  # no callback collects, and nothing happens
    assert notes.metrics == {"length": [4.0, 0.0], "slow": [0.5]}
    assert notes.columns == {"first": ["a", "b", "c", "d"], "last": ["a", "b", "c", "d"]}
    assert others.metrics["length"] == [2.0, 0.0]


def test_threads_that_score_collect_their_own_notes():
    def reward(completions, log_metric):
        log_metric("seen", len(completions[0]))
        return [0.0] * len(completions)

    scorer = FunctionScorer(reward)

    def score(length):
        with noting() as notes:
            score_groups([group("p", ["x" * length])] * 2, [scorer])
        return notes.metrics

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(score, range(1, 9))) == [{"seen": [float(n)]} for n in range(1, 9)]


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (lambda log_extra, log_metric: log_extra("x", [1]), r"log_extra\('x', ...\) got 1 values for 4 completions"),
        (
            lambda log_extra, log_metric: log_metric("x", "much"),
            r"log_metric\('x', ...\) got str 'much'; give a number",
        ),
    ],
)
def test_notes_that_are_none_are_refused_with_the_function_s_name(note, message):
    def reward(log_extra, log_metric, **kwargs):
        note(log_extra, log_metric)

    with pytest.raises(ScoringError, match=rf"Reward function `reward` raised \w+: {message}"):
        FunctionScorer(reward).score(GROUPS)


def test_conversational_completions_are_messages():
    def reward(prompts, completions):
        assert prompts == [ASK, ASK]
        assert completions == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "bb"}]]
        return [len(completion[0]["content"]) for completion in completions]

    assert FunctionScorer(reward).score([group(ASK, ["a", "bb"])]) == [[1.0, 2.0]]


def test_a_function_that_changes_messages_does_not_change_the_prompt():
    def reward(prompts, completions):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt[0]["content"] = "gone"
            prompt.extend(completion)
        return [len(prompt) for prompt in prompts]

    asked = group([{"role": "user", "content": "Hi"}], ["a", "bb"])
    assert FunctionScorer(reward).score([asked]) == [[2.0, 2.0]]
    assert asked.prompt.content == ASK


def test_only_named_arguments_are_passed_and_defaults_stay():
    def reward(completions, answer, *, scale=10, missing=5):
        return [scale * len(text) + a + missing for text, a in zip(completions, answer, strict=True)]

    assert FunctionScorer(reward).score(GROUPS) == [[18.0, 28.0], [39.0, 49.0]]


def test_a_column_that_only_some_prompts_have_is_none_elsewhere():
    mixed = [group("p", ["a", "b"], answer=1), group("q", ["c", "d"], other=2)]
    seen = {}

    def reward(answer, other):
        seen.update(answer=answer, other=other)
        return [None, None, 1, 2]

    assert FunctionScorer(reward).score(mixed) == [[None, None], [1.0, 2.0]]
    assert seen == {"answer": [1, 1, None, None], "other": [None, None, 2, 2]}


def test_an_argument_that_there_is_none_for():
    def reward(completions, solution):
        return []

    with pytest.raises(ValueError, match=r"`reward` needs the argument `solution`.*Available columns: answer\."):
        FunctionScorer(reward).score(GROUPS)


def test_positional_only_is_refused_at_once():
    def reward(completions, /):
        return []

    with pytest.raises(ValueError, match="`reward` has the positional-only parameter `completions`"):
        FunctionScorer(reward)


def test_a_function_without_arguments_is_refused_at_once():
    with pytest.raises(ValueError, match="`reward` takes no arguments. Give it `completions`"):
        FunctionScorer(lambda: [], name="reward")


@pytest.mark.parametrize(
    ("score", "number"), [(10**400, math.inf), (-(10**400), -math.inf), (Fraction(10**5000), math.inf), (10**30, 1e30)]
)
def test_a_number_beyond_floats_is_infinite_which_counts_as_missing(score, number):
    scores = FunctionScorer(lambda completions: [score] * len(completions)).score(GROUPS)
    assert {value for group in scores for value in group} == {number}


def test_what_cannot_be_called():
    with pytest.raises(TypeError, match="must be callable; this is int 3"):
        FunctionScorer(3)  # pyright: ignore[reportArgumentType]


def test_no_groups_no_call():
    def reward(**kwargs):
        raise AssertionError("called")

    assert FunctionScorer(reward).score([]) == []


# --- names ----------------------------------------------------------------------------------------------------------


class Brevity:
    def __call__(self, completions):
        return [-len(text) for text in completions]


class SlowBrevity:
    async def __call__(self, completions):
        await asyncio.sleep(0)
        return [-len(text) for text in completions]


def scaled(completions, factor):
    return [factor * len(text) for text in completions]


def test_names():
    assert FunctionScorer(scaled).name == "scaled"
    assert FunctionScorer(functools.partial(functools.partial(scaled), factor=2)).name == "scaled"
    assert FunctionScorer(functools.partial(Brevity())).name == "Brevity"
    assert FunctionScorer(Brevity()).name == "Brevity"
    assert FunctionScorer(scaled, name="length").name == "length"


def test_partials_and_objects_are_called():
    assert FunctionScorer(functools.partial(scaled, factor=2)).score(GROUPS) == [[2.0, 4.0], [6.0, 8.0]]
    assert FunctionScorer(Brevity()).score(GROUPS) == [[-1.0, -2.0], [-3.0, -4.0]]


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        (1, 0.5, True, -2),
        [torch.tensor(1), np.float32(0.5), np.True_, np.array(-2)],
        torch.tensor([1, 0.5, 1, -2], dtype=torch.bfloat16, requires_grad=True),
        np.array([1, 0.5, 1, -2]),
        np.array([1, 0.5, True, -2], dtype=object),
    ],
)
def test_accepted_returns(value):
    scores = returning(value).score(GROUPS)
    assert scores == [[1.0, 0.5], [1.0, -2.0]]
    assert all(type(score) is float for row in scores for score in row)


def test_none_nan_and_inf_pass_through():
    (none, nan), (inf, one) = returning([None, math.nan, -math.inf, 1]).score(GROUPS)
    assert none is None and nan is not None and math.isnan(nan) and inf == -math.inf and one == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"`reward` returned float 0\.5"),
        ("good", r"`reward` returned str 'good'"),
        ({"score": 1}, r"`reward` returned dict \{'score': 1\}"),
        (None, r"`reward` returned None"),
        (torch.tensor(1.0), r"`reward` returned a tensor of shape \(\)"),
        (torch.ones(4, 1), r"`reward` returned a tensor of shape \(4, 1\)"),
        (np.ones((2, 2)), r"`reward` returned an array of shape \(2, 2\)"),
        (
            [1, 2, 3],
            r"`reward` returned 3 scores for 4 completions \(2 prompts\).*prompt 0 completion 0, prompt 0 completion 1",
        ),
        ([1, "2", 3, 4], r"`reward` returned str '2' at index 1\. Each score must be a number or None"),
        ([1, 2, [3], 4], r"`reward` returned list \[3\] at index 2"),
        ([1, 2, 3, torch.ones(1)], r"`reward` returned Tensor .* at index 3"),
        ([1, 2, 3, 1j], r"`reward` returned complex 1j at index 3"),
    ],
)
def test_refused_returns(value, message):
    with pytest.raises(ScoringError, match=message):
        returning(value).score(GROUPS)


def test_a_function_that_raises_is_named_and_chained():
    def broken(completions):
        raise KeyError("answer")

    async def broken_too(completions):
        raise KeyError("answer")

    for function in (broken, broken_too):
        with pytest.raises(ScoringError, match=f"`{function.__name__}` raised KeyError: 'answer'") as caught:
            FunctionScorer(function).score(GROUPS)
        assert isinstance(caught.value.__cause__, KeyError)


# --- async ----------------------------------------------------------------------------------------------------------


def test_async_functions_and_objects():
    async def reward(completions, answer):
        await asyncio.sleep(0)
        return [len(text) * a for text, a in zip(completions, answer, strict=True)]

    assert FunctionScorer(reward).is_async
    assert FunctionScorer(reward).score(GROUPS) == [[3.0, 6.0], [12.0, 16.0]]
    assert FunctionScorer(SlowBrevity()).is_async
    assert FunctionScorer(functools.partial(SlowBrevity())).score(GROUPS) == [[-1.0, -2.0], [-3.0, -4.0]]
    assert not FunctionScorer(Brevity()).is_async


def test_async_return_is_checked_too():
    async def reward(**kwargs):
        return [1.0]

    with pytest.raises(ScoringError, match="`reward` returned 1 scores for 4 completions"):
        FunctionScorer(reward).score(GROUPS)
    assert FunctionScorer(reward).score([]) == []


def test_async_where_a_loop_is_running():
    async def reward(completions):
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    async def notebook():
        return FunctionScorer(reward).score(GROUPS)

    assert asyncio.run(notebook()) == [[1.0, 2.0], [3.0, 4.0]]


def test_async_calls_share_one_loop_so_that_clients_stay_usable():
    loops = []

    async def reward(completions):
        loops.append((asyncio.get_running_loop(), threading.current_thread()))
        return [0.0 for _ in completions]

    scorer = FunctionScorer(reward)
    scorer.score(GROUPS)
    scorer.score(GROUPS)
    assert loops[0] == loops[1]
    assert loops[0][1] is not threading.current_thread()


def test_an_interrupted_wait_cancels_the_function(monkeypatch):
    cancelled = threading.Event()

    async def reward(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt(self, timeout=None):
        time.sleep(0.05)  # the function has begun to wait
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FunctionScorer(reward).score(GROUPS)
    assert cancelled.wait(5)
