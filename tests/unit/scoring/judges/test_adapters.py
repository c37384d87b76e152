"""Judges: the texts they see, the ranks they may give."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from online_dpo.errors import FeedbackStopped, ScoringError
from online_dpo.scoring.judge_registry import check_judge, pairwise_scorer
from online_dpo.scoring.judges.adapters import FunctionJudge, JudgeScorer
from online_dpo.scoring.protocols import PairwiseScorer
from online_dpo.types import Completion, Group, Prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.name is defined %}({{ m.name }}){% endif %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood is defined %}[{{ mood }}]{% endif %}{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    made.chat_template = template
    return made


def group(content, texts) -> Group:
    return Group(Prompt(content, (1,), row=0), tuple(Completion((1,), (-1.0,), "stop", 0, text) for text in texts))


class Longest:
    """In the form of TRL's judges."""

    def __init__(self):
        self.seen = []

    def judge(self, prompts, completions, shuffle_order=True):
        self.seen.append((prompts, completions, shuffle_order))
        return [int(len(second) > len(first)) for first, second in completions]


GROUPS = [group("p", ["a", "bb"]), group("q", ["ccc", "d"])]


def test_ranks_and_what_the_judge_sees():
    judge = Longest()
    scorer = JudgeScorer(judge, tokenizer())
    assert isinstance(scorer, PairwiseScorer) and scorer.name == "Longest"
    assert scorer.rank(GROUPS) == [1, 0]
    assert judge.seen == [(["p", "q"], [["a", "bb"], ["ccc", "d"]], True)]
    assert scorer.rank([]) == [] and len(judge.seen) == 1
    assert scorer.prefer(GROUPS) == [0.0, 1.0]
    assert JudgeScorer(lambda *_, **__: [-1, 0], tokenizer()).prefer(GROUPS) == [None, 1.0]


def test_a_function_is_a_judge_too():
    def first(prompts, completion_pairs, shuffle_order=True):
        return [0 for _ in prompts]

    scorer = JudgeScorer(first, tokenizer())
    assert scorer.name == "first" and scorer.rank(GROUPS) == [0, 0]
    assert JudgeScorer(first, tokenizer(), name="house").name == "house"


def test_conversations_are_rendered_for_an_answer():
    judge = Longest()
    talk = [{"role": "system", "content": "S", "name": None}, {"role": "user", "content": "Hi", "name": "Al"}]
    started = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    scorer = JudgeScorer(judge, tokenizer(), chat_template_kwargs={"mood": "calm"})
    scorer.rank([group(talk, ["a", "b"]), group(started, ["a", "b"])])
    assert judge.seen[0][0] == ["<system>S;<user>Hi(Al);<assistant>[calm]", "<user>Hi;<assistant>Well"]


def test_conversation_without_template():
    with pytest.raises(ValueError, match="no chat template.*judge `Longest`"):
        JudgeScorer(Longest(), tokenizer(None)).rank([group([{"role": "user", "content": "Hi"}], ["a", "b"])])


@pytest.mark.parametrize(
    "ranks", [[1, -1], (1, -1), torch.tensor([1, -1]), np.array([1, -1]), [np.int64(1), np.int8(-1)]]
)
def test_accepted_ranks(ranks):
    result = JudgeScorer(lambda *a, **k: ranks, tokenizer()).rank(GROUPS)
    assert result == [1, -1] and all(type(rank) is int for rank in result)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([True, False], "returned bool True at index 0. A rank is the int 0, 1 or -1"),
        (torch.tensor([True, False]), "returned bool True at index 0"),
        ([np.True_, 0], "returned bool_? .*True.* at index 0"),
        ([0, 2], "returned int 2 at index 1"),
        ([0, 1.0], "returned float 1.0 at index 1"),
        ([0, None], "returned None at index 1"),
        ([0], "returned 1 ranks for 2 prompts"),
        (None, "returned None"),
        ("01", "returned str '01'"),
        (1, "returned int 1"),
        (torch.zeros(2, 1, dtype=torch.long), r"returned a tensor of shape \(2, 1\)"),
    ],
)
def test_refused_ranks(ranks, message):
    with pytest.raises(ScoringError, match=f"Judge `house` {message}"):
        JudgeScorer(lambda *a, **k: ranks, tokenizer(), name="house").rank(GROUPS)


def test_a_judge_that_raises():
    def offline(prompts, completion_pairs, shuffle_order=True):
        raise ConnectionError("no route")

    with pytest.raises(ScoringError, match="Judge `offline` raised ConnectionError: no route") as caught:
        JudgeScorer(offline, tokenizer()).rank(GROUPS)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_wrong_number_of_completions_and_wrong_judge():
    with pytest.raises(ValueError, match="two completions, but a group has 3"):
        JudgeScorer(Longest(), tokenizer()).rank([*GROUPS, group("r", ["a", "b", "c"])])
    with pytest.raises(TypeError, match="`judge` must have a method.*this is int 5"):
        JudgeScorer(5, tokenizer())  # pyright: ignore[reportArgumentType]


# --- functions of one pair --------------------------------------------------------------------------------------------


def shorter(prompt, first, second):
    return len(first) < len(second)


def test_a_function_of_one_pair():
    judge = FunctionJudge(shorter)
    assert isinstance(judge, PairwiseScorer) and judge.name == "shorter"
    assert judge.prefer(GROUPS) == [1.0, 0.0] and judge.judge(["p", "q"], [["a", "bb"], ["ccc", "d"]]) == [0, 1]
    assert FunctionJudge(shorter, name="house").name == "house" and judge.prefer([]) == []

    @FunctionJudge
    def seen(prompt, first, second):
        return {"a": 0.25, "ccc": None}[first] if (prompt, first, second) in ASKED else 1

    assert seen.name == "seen" and seen.prefer(GROUPS) == [0.25, None]


ASKED = [("p", "a", "bb"), ("q", "ccc", "d")]


def test_messages_may_be_changed_in_place():
    talk = [{"role": "user", "content": "Hi"}]
    assert FunctionJudge(lambda prompt, a, b: prompt.pop()["content"] == "Hi").prefer([group(talk, ["a", "b"])]) == [1]
    assert talk == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("reply", "preference"),
    [(True, 1.0), (np.bool_(False), 0.0), (1, 1.0), (np.float32(0.5), 0.5), (torch.tensor(0.25), 0.25), (None, None)]
    + [(float("nan"), None), (torch.tensor(float("nan")), None)],
)
def test_what_a_function_may_say(reply, preference):
    [found] = FunctionJudge(lambda *_: reply).prefer(GROUPS[:1])
    assert found == preference and type(found) is type(preference)


@pytest.mark.parametrize("reply", [-1, 1.5, float("inf"), "0.5", [0.5], torch.tensor([0.5])])
def test_what_a_function_may_not_say(reply):
    with pytest.raises(ScoringError, match="Judge `house` returned .*Return the probability"):
        FunctionJudge(lambda *_: reply, name="house").prefer(GROUPS)


def test_an_async_function_is_asked_about_several_pairs_at_once():
    now, most, cancelled = 0, 0, []

    async def slow(prompt, first, second):
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        try:
            await asyncio.sleep(0.01 if prompt != "waits" else 60)
        except asyncio.CancelledError:
            cancelled.append(first)
            raise
        now -= 1
        if prompt == "fails":
            raise ConnectionError("no route")
        return int(first) / 10

    comparisons = [group("p", [str(i), "x"]) for i in range(10)]
    assert FunctionJudge(slow, concurrency=3).prefer(comparisons) == [i / 10 for i in range(10)] and most == 3
    with pytest.raises(ScoringError, match="Judge `slow` raised ConnectionError: no route"):
        FunctionJudge(slow).prefer([group("waits", ["8", "x"]), group("fails", ["1", "x"]), group("waits", ["9", "x"])])
    for _ in range(100):
        if len(cancelled) == 2:
            break
        time.sleep(0.01)
    assert sorted(cancelled) == ["8", "9"]
    now = most = 0
    judge = FunctionJudge(slow, concurrency=3)
    with ThreadPoolExecutor(2) as threads:  # as with `max_staleness`
        assert (
            list(threads.map(judge.prefer, [comparisons, comparisons])) == [[i / 10 for i in range(10)]] * 2
            and most == 3
        )
    with pytest.raises(ValueError, match="`concurrency` must be 1 or more; it is 0"):
        FunctionJudge(slow, concurrency=0)


def test_errors_of_a_function():
    def broken(prompt, first, second):
        raise KeyError("answer")

    def stops(prompt, first, second):
        raise FeedbackStopped("enough")

    with pytest.raises(ScoringError, match="Judge `broken` raised KeyError: 'answer'"):
        FunctionJudge(broken).prefer(GROUPS)
    with pytest.raises(FeedbackStopped, match="enough"):
        FunctionJudge(stops).prefer(GROUPS)
    with pytest.raises(ValueError, match="two completions, but a group has 3"):
        FunctionJudge(shorter).prefer([group("r", ["a", "b", "c"])])
    with pytest.raises(TypeError, match=r"called as f\(prompt, first, second\)"):
        FunctionJudge(lambda prompts, pairs: [])


def test_which_form_a_function_has():
    """With `shuffle_order` it is TRL's, which is called with it."""
    of_pair = pairwise_scorer(lambda prompt, a, b: 0.25, tokenizer())
    assert isinstance(of_pair, FunctionJudge) and of_pair.prefer(GROUPS) == [0.25, 0.25]
    for of_lists in (lambda prompts, pairs, shuffle_order=True: [1, 0], lambda *_, **__: [1, 0], Longest()):
        assert pairwise_scorer(of_lists, tokenizer()).prefer(GROUPS) == [0.0, 1.0]
    assert pairwise_scorer(of_pair, tokenizer()) is of_pair
    with pytest.raises(TypeError, match=r"`judge` must have `name`.*or of the form f\(prompt, first, second\)"):
        pairwise_scorer(lambda prompts, pairs: [1, 0], tokenizer())


def test_a_function_of_another_form_is_shown_with_its_arguments():
    def compare(question, pair):
        return 0

    with pytest.raises(TypeError, match=r"this is the function compare\(question, pair\)\."):
        check_judge(compare, "judge")
    with pytest.raises(TypeError, match=r"this is the function compare\(question, pair\)\."):
        FunctionJudge(compare)
