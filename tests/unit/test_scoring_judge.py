"""Judges: the texts they see, the ranks they may give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from online_dpo.errors import ScoringError
from online_dpo.scoring import JudgeScorer, PairwiseScorer
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
