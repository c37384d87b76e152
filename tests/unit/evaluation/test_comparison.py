"""Numbers of a comparison of two models, on verdicts and lengths made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset

from online_dpo.evaluation import head_to_head
from online_dpo.evaluation.comparison import PromptResult, compare, preferences_by_score
from online_dpo.evaluation.head_to_head import BothOrders, ComparedModel
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import SamplingParams, Stream
from online_dpo.stats.intervals import wilson_interval
from online_dpo.stats.length_control import length_controlled_win_rate
from online_dpo.types import Completion, Group, Prompt
from support import tiny
from support.training import config


def answers(row, *texts, finished=True):
    made = (
        Completion((5,) * len(text.split()), (0.0,) * len(text.split()), "stop" if finished else "length", 0, text)
        for text in texts
    )
    return Group(Prompt("p", (1,), row), tuple(made))


def prompt_result(row, preferences, model=None, against=None, **fields):
    texts = ["a b c"] * len(preferences)
    return PromptResult(
        answers(row, *(model or texts)),
        answers(row, *(against or texts), finished=False),
        tuple(preferences),
        **fields,
    )


def test_clear_comparisons_get_wilsons_interval():
    """70 wins, 10 ties and 20 losses: 75 points of 100; by hand: (0.75 + 0.0192073) / 1.0384146 -+ ..."""
    results = [prompt_result(row, [1.0 if row < 70 else 0.5 if row < 80 else 0.0]) for row in range(100)]
    result = compare(results, seed=0)
    assert (result["wins"], result["ties"], result["losses"], result["undecidable"]) == (70, 10, 20, 0)
    rate = result["win_rate"]
    assert rate["value"] == 0.75 and rate["interval"] == "wilson"
    z2 = 1.959964**2
    centre, half = (0.75 + z2 / 200) / (1 + z2 / 100), math.sqrt(0.75 * 0.25 / 100 + z2 / 40000) * 1.959964
    assert rate["low"] == pytest.approx(centre - half / (1 + z2 / 100))
    assert rate["high"] == pytest.approx(centre + half / (1 + z2 / 100))
    assert (rate["low"], rate["high"]) == pytest.approx((0.6570, 0.8246), abs=5e-4)
    assert result["score"] is None and result["kl"] is None
    assert result["ended"] == {"model": 1.0, "against": 0.0}
    assert result["tokens"] == {"model": 3.0, "against": 3.0}
    assert result["characters"] == {"model": 5.0, "against": 5.0}


def test_soft_preferences_and_several_answers_get_a_bootstrap_over_prompts():
    soft = compare([prompt_result(row, [0.9 if row % 2 else 0.3]) for row in range(60)], seed=0)
    assert soft["win_rate"]["interval"] == "bootstrap" and soft["win_rate"]["value"] == pytest.approx(0.6)
    half_width = 1.96 * 0.3 / math.sqrt(60)
    assert soft["win_rate"]["high"] - soft["win_rate"]["low"] == pytest.approx(2 * half_width, rel=0.1)
    assert (soft["wins"], soft["losses"]) == (30, 30)
    # answers of one prompt that all end alike are one prompt's worth of evidence, not four
    several = compare([prompt_result(row, [float(row % 2)] * 4) for row in range(60)], seed=0)["win_rate"]
    assert several["interval"] == "bootstrap" and several["value"] == 0.5
    assert several["high"] - several["low"] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(60), rel=0.1)


def test_where_all_prompts_end_the_same_a_bootstrap_would_be_sure_of_too_much():
    rate = compare([prompt_result(row, [1.0, 1.0]) for row in range(20)], seed=0)["win_rate"]
    assert rate["interval"] == "wilson" and (rate["low"], rate["high"]) == wilson_interval(1.0, 20)


@pytest.mark.smoke
def test_missing_scores_are_counted_and_never_numbers():
    rows = [([1.0], [0.0]), ([None], [5.0]), ([3.0], [None]), ([2.0], [2.0])]
    results = [
        prompt_result(row, preferences_by_score(mine, theirs), model_scores=tuple(mine), against_scores=tuple(theirs))
        for row, (mine, theirs) in enumerate(rows)
    ]
    result = compare(results, seed=0)
    assert (result["duels"], result["undecidable"], result["wins"], result["ties"]) == (4, 2, 1, 1)
    assert result["win_rate"]["value"] == 0.75
    score = result["score"]
    assert score["model"]["value"] == 2.0 and score["model"]["missing"] == 1
    assert score["against"]["value"] == pytest.approx(7 / 3) and score["against"]["missing"] == 1
    assert score["difference"]["value"] == 0.5  # of the two prompts in which both have one


def test_nothing_told_gives_no_numbers():
    result = compare([prompt_result(0, [None], model_scores=(None,), against_scores=(None,))], seed=0)
    assert result["win_rate"] is None and result["length_controlled_win_rate"] is None
    assert result["score"]["difference"] == {"value": None, "low": None, "high": None, "interval": "bootstrap"}


def test_a_paired_difference_is_surer_than_the_scores():
    """Prompts differ by far more than the models do."""
    generator = np.random.default_rng(0)
    results = []
    for row in range(80):
        base = generator.normal(0, 10)
        mine, theirs = (base + 1 + generator.normal(0, 0.1),), (base,)
        results.append(prompt_result(row, preferences_by_score(mine, theirs), model_scores=mine, against_scores=theirs))
    score = compare(results, seed=0)["score"]
    assert score["model"]["high"] - score["model"]["low"] > 3
    difference = score["difference"]
    assert difference["value"] == pytest.approx(1, abs=0.05) and difference["high"] - difference["low"] < 0.1


def test_kl_is_the_mean_log_ratio_with_its_error_over_prompts():
    kl = compare(
        [prompt_result(row, [1.0], log_ratios=(value, value + 2)) for row, value in enumerate((1.0, 3.0))], seed=0
    )
    assert kl["kl"] == {"value": 3.0, "standard_error": pytest.approx(1.0)}


def test_length_control_uses_characters_and_leaves_out_what_was_not_told():
    results = [
        prompt_result(row, [float(row % 5 != 0)], model=["long answer " * (1 + row % 7)], against=["short"])
        for row in range(140)
    ]
    figures = compare(results, seed=0)
    differences = np.array([12.0 * (1 + row % 7) - 5 for row in range(140)])
    expected = length_controlled_win_rate(np.array([float(row % 5 != 0) for row in range(140)]), differences)
    assert figures["length_controlled_win_rate"]["value"] == pytest.approx(expected)
    with_gaps = compare([*results, *(prompt_result(row, [None]) for row in range(140, 180))], seed=0)
    assert with_gaps["length_controlled_win_rate"]["value"] == pytest.approx(expected)
    assert with_gaps["undecidable"] == 40


def test_both_orders_cancel_position_bias():
    class First:
        name = "first"

        def __init__(self, wins):
            self.wins = wins

        def prefer(self, comparisons):
            return self.wins(comparisons)

    comparisons = [tiny.group(tiny.prompts([3])[0], [[5, 6], [7, 8]])] * 3
    assert BothOrders(First(lambda comparisons: [1.0] * len(comparisons))).prefer(comparisons) == [0.5] * 3
    best = [float(comparison.completions[0].token_ids == (5, 6)) for comparison in comparisons]
    assert (
        BothOrders(First(lambda d: [float(x.completions[0].token_ids == (5, 6)) for x in d])).prefer(comparisons)
        == best
    )
    assert BothOrders(First(lambda comparisons: [0.8, None, 0.8, 0.2, 0.2, None])).prefer(comparisons) == [
        0.8,
        None,
        None,
    ]


def test_models_are_sampled_as_the_configuration_says(tmp_path, monkeypatch):
    own, engines = TransformersEngine.generate, []
    monkeypatch.setattr(TransformersEngine, "generate", lambda self, *call: engines.append(self) or own(self, *call))
    prompts = {prompt.row: prompt for prompt in tiny.prompts((3, 5))}
    compared = ComparedModel("model", tiny.tokenizer(), Dataset.from_dict({}), prompts)
    args = config(tmp_path, cuda_graphs=False, rollout_batch_size=5)
    params = SamplingParams(max_new_tokens=2, end_token_ids=(tiny.EOS,))
    groups = head_to_head._sample(tiny.causal_lm(), compared, list(prompts), params, args, 1, Stream.HELD_OUT)
    [engine] = engines
    assert len(groups) == 2 and engine.static_steps is False and engine.batch_size == 5
