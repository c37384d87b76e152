"""NaN and infinite scores are failures that stop a run; `None` is none. For each kind of scorer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.accounting import ScoreFailures
from online_dpo.scoring.assess import AssessmentOptions, Assessor
from online_dpo.scoring.judge_registry import pairwise_scorer
from online_dpo.scoring.judges.adapters import FunctionJudge
from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.rewards.function import FunctionScorer
from online_dpo.scoring.rewards.model import RewardModelScorer
from online_dpo.types import Group
from support import tiny
from support.endpoint import comparison

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


def groups(count: int, completions: int = 2) -> list[Group]:
    return [comparison(f"w{i} w1", f"w2 w{i}", prompt="w3") for i in range(10, 10 + count)]


def assessor(function: Callable[..., Any], max_share: float = 0.2) -> Assessor:
    scorer = FunctionScorer(function, name="f")
    return Assessor([scorer], options=lambda: AssessmentOptions(max_failure_share=max_share))


def broken(labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=tiny.VOCABULARY, num_labels=labels, **SIZES)).eval()
    model.score.weight.data.fill_(math.nan)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_function_that_gives_no_number_stops_the_run_from_the_twentieth_score_on(value: float) -> None:
    made = assessor(lambda completions: [value] * len(completions))
    scores = made.assess(groups(9))
    assert scores.values == [[None, None]] * 9  # pyright: ignore
    with pytest.raises(FeedbackStopped) as caught:
        made.assess(groups(1))
    assert str(caught.value) == (
        "Reward `f` gave no usable answer to 20 of the last 20 questions, more than `max_failure_share` (0.2) allows. "
        f"Last cause: a score of {value}"
    )


def test_none_is_no_failure_and_no_answer() -> None:
    made = assessor(lambda completions: [None] * len(completions))
    for _ in range(5):
        made.assess(groups(20))

    def half(completions):
        return [(math.nan, None, 1.0)[i % 3] for i in range(len(completions))]

    made = assessor(half)
    made.assess(groups(14))  # 28 completions, 19 of them scored
    with pytest.raises(FeedbackStopped, match="to 11 of the last 20 questions"):
        made.assess(groups(1))


def test_a_share_within_the_limit_goes_on() -> None:
    def tenth(completions):
        return [math.nan if i % 10 == 0 else float(i) for i in range(len(completions))]

    made = assessor(tenth)
    for _ in range(20):
        made.assess(groups(10))
    made = assessor(lambda completions: [math.nan] * len(completions), max_share=1.0)
    for _ in range(20):
        made.assess(groups(10))


def test_each_scorer_has_a_count_of_its_own_and_one_that_counts_itself_is_left_out() -> None:
    failures = ScoreFailures()
    good, bad = FunctionScorer(lambda completions: [], name="good"), FunctionScorer(lambda completions: [], name="bad")
    failures.add(good, [[1.0] * 100], 0.2)
    with pytest.raises(FeedbackStopped, match="Reward `bad`"):
        failures.add(bad, [[math.nan] * 20], 0.2)
    own: Any = FunctionScorer(lambda completions: [], name="own")
    own.counts_failures = True
    failures.add(own, [[math.nan] * 50], 0.2)


def test_a_reward_model_with_a_broken_head() -> None:
    scorer = RewardModelScorer(broken(), tiny.tokenizer(), name="rm")
    made = Assessor([scorer], options=lambda: AssessmentOptions(max_failure_share=0.2))
    with pytest.raises(FeedbackStopped, match=r"Reward `rm` gave no usable answer .* Last cause: a score of nan"):
        made.assess(groups(10))


def test_a_pairwise_model_with_nan_logits() -> None:
    judge = PairwiseModelJudge(broken(), tiny.tokenizer(), name="j", template="{prompt} {first} {second}")
    assert judge.prefer(groups(19)) == [None] * 19
    with pytest.raises(FeedbackStopped, match=r"Judge `j` .* 20 of the last 20 .*the model's output is not finite"):
        judge.prefer(groups(1))
    lenient = PairwiseModelJudge(
        broken(), tiny.tokenizer(), template="{prompt} {first} {second}", max_failure_share=1.0
    )
    assert lenient.prefer(groups(30)) == [None] * 30


def test_a_function_as_judge() -> None:
    def nothing(prompt, first, second):
        return math.nan

    assert FunctionJudge(lambda prompt, first, second: None).prefer(groups(50)) == [None] * 50
    with pytest.raises(FeedbackStopped, match=r"Judge `nothing` .* Last cause: its preference is nan"):
        FunctionJudge(nothing).prefer(groups(20))
    judge = pairwise_scorer(nothing, tiny.tokenizer(), max_failure_share=1.0)
    assert judge.prefer(groups(50)) == [None] * 50
